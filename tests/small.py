"""A network of two attention layers, for tests of one module by itself: no pipeline, no recording."""

import torch
from diffusers.models.attention_processor import Attention


ROWS, TOKENS, WIDTH = 2, 5, 8


class Small(torch.nn.Module):
    """Self-attention, then cross-attention, each with its residual."""

    def __init__(self):
        super().__init__()
        self.attn1 = Attention(query_dim=WIDTH, heads=2, dim_head=4)
        self.attn2 = Attention(query_dim=WIDTH, heads=2, dim_head=4, cross_attention_dim=WIDTH)

    def forward(self, sample, timestep, encoder_hidden_states):
        hidden = sample + self.attn1(sample)
        return (hidden + self.attn2(hidden, encoder_hidden_states),)


def small():
    return Small().eval().requires_grad_(False)


def inputs(rows=ROWS):
    """A sample and a text, `(rows, tokens, width)` each, of different numbers in each row."""
    return torch.randn(rows, TOKENS, WIDTH), torch.randn(rows, 3, WIDTH)
