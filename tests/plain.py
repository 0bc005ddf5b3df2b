"""The obvious PyTorch code: unfold, multiply, softmax, in the dtype of the maps, differentiated by autograd.

Its errors are the yardstick of the library's (`budget`). It stores kH*kW copies of keys and values.
"""

import torch
import torch.nn.functional as F


def neighbours(x, kernel):
    """[B, C, H, W] -> [B, C, H, W, kH*kW], zeros outside the map."""
    (rows, columns), (top, left) = kernel, (kernel[0] // 2, kernel[1] // 2)
    x = F.pad(x, (left, columns - 1 - left, top, rows - 1 - top))
    return x.unfold(2, rows, 1).unfold(3, columns, 1).flatten(4)


def there(x, kernel):
    """Which slots hold a key in the map: [1, 1, H, W, kH*kW]."""
    return neighbours(torch.ones_like(x[:1, :1]), kernel) > 0


def similarity(query, key, kernel, heads=1, scale=1.0, border="zeros"):
    q, k = query.unflatten(1, (heads, -1)), neighbours(key, kernel).unflatten(1, (heads, -1))
    weight = (q[..., None] * k).sum(2) * scale
    return weight if border == "zeros" else weight.masked_fill(~there(key, kernel), float("-inf"))


def aggregate(weight, value, kernel, heads=1, border="zeros"):
    v = neighbours(value, kernel).unflatten(1, (heads, -1))
    weight = weight.masked_fill(~there(value, kernel), 0.0)
    return (weight[:, :, None] * v).sum(-1).flatten(1, 2)


def attention(query, key, value, kernel, heads=1, scale=1.0, border="zeros", softmax=torch.softmax):
    logits = similarity(query, key, kernel, heads, scale, border)
    return aggregate(softmax(logits, -1), value, kernel, heads, border), logits.logsumexp(-1)


def softmax_in_steps(logits, dim):
    """The softmax, written so that autograd takes each step of its derivative by itself."""
    mass = (logits - logits.detach().amax(dim, keepdim=True)).exp()
    return mass / mass.sum(dim, keepdim=True)
