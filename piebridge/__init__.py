"""PieBridge: parameter-efficient training that is fast as well.

The frozen layers of a network (the *prefix*) are approximated by cheaper *subnets* while a small trainable
part (the *suffix*) learns; the trained part is then used with the original, untouched network.

The modules read from the bottom up: `config`, `records`, `costs` -> `data`, `backbones` -> `subnets`, `router`,
`pet`, `engines` -> `latents`, `routing` -> `training` -> `methods`. `figures` reads records only.
"""

__version__ = "0.1.0"
