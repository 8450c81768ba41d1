"""Several devices: meshes, how arrays are cut along them, products with what is cut."""
