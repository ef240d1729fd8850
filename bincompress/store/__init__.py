"""How a model lies in a Zarr v3 store."""
