"""Every option, its default and meaning; the rules between them."""
