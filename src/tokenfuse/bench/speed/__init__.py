"""How much faster compression makes a model of a real size, measured where it runs."""
