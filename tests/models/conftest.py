"""The engine runs one thread a rank; a second one would only wait for a processor here."""

import torch

torch.set_num_threads(1)
