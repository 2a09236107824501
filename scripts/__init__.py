"""The commands; installed as the package `guided_pixels`, whose command `guided-pixels` reaches each of them."""
