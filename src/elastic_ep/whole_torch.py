"""All of torch, for ranks on a GPU: see `lean_torch`."""

from elastic_ep import lean_torch

lean_torch.bring_in()
