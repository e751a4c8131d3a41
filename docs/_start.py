import torch
from torch import nn

torch.manual_seed(0)
encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 128))  # yours, with its projection head
loader = torch.randn(3, 2, 16, 3, 32, 32)  # yours: batches of two augmented views of each image
