"""ADM networks as `UNet2DModel` of diffusers, and back, where the architectures agree; diffusers is not needed.

`weights` renames parameters, `configurations` says what two networks have in common and what differs, `files` reads and
writes folders as diffusers lays them out.
"""
