"""Reading data sets: binary formats, image files, lists, .beton files, downloads."""
