"""What `eqx_attention.benchmark` is made of. Nothing here is imported until it is used."""
