"""What the networks' options and files say of shapes: channels by image size, and the ways to pool."""

# Multiples of the base channels by image size, where they are not given; those of 32 are improved-diffusion's.
CHANNEL_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2"}
UPSAMPLER_CHANNEL_MULT = {512: "1,1,2,2,4,4", 256: "1,1,2,2,4,4", 64: "1,2,3,4"}
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
