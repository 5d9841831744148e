"""A tokenfuse plug-in: the strategy checkerboard, and an adapter for LFM2-VL."""
