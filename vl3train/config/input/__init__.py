"""What users write: the options that exist, the choices of groups, files and overrides."""
