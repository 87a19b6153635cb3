"""The network: a decoder-only transformer, its adapters and its attention kernels. It reads and writes no
file.

Read `config` (the shape of a model, and the letters used for array shapes everywhere) and `transformer`
first. `lora` adds adapters to a model. `attention` is the reference for attention over whole rows; `tiles`
and `flash` are its Pallas kernels. `products` is where a kernel for the matrix product goes in; kernels for
attention in decoding go into `pasta_jax.decode.attention`. `sharding` places weights and batches on a mesh of devices.
"""
