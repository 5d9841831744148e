"""tokenfuse inside other programs; nothing here is imported unless they ask for it."""
