"""The operators in plain torch, on any device and in any dtype: tiles of queries against the halo of their keys.

A tile of TH x TW queries needs only the (TH+kH-1) x (TW+kW-1) keys of its halo, so attention is a batch of small
dense products, of which the scores out of window are thrown away. Maps are read and written in strips of TH rows and
their halo, so many heads and images at a time as fill a product; strips and sums are fp32, fp64 for fp64. Derivatives
are in closed form. Every result is the same, bit for bit, whenever it is computed again on the same machine.

Where windows slide, a halo is a run of columns of its strip. Where they do not (shift, reflect, replicate, circular,
dilation, two grids) the queries of a tile are of one residue of the dilation, so that their keys are dense among every
dilation-th position, and halos are copied side by side; nothing else differs. Heads that share a head of the keys are
more queries of the same tile.

Memory beyond the results: 1 MiB of scores (twice that in the backward; more where the scores of one tile take more),
up to 4 MiB of masks and biases of such scores, and for each map that an operator reads or writes a strip of TH rows at
the queries, two of TH+kH-1 rows at the keys; TH is 32 at most, and 8 as a rule. The sums of the backward take another
halo for each tile of a product, and so does each map at the keys where windows do not slide. There the unfused
operators take a strip of weights too, and gradients of keys and values of half precision are summed in an fp32 map, of
the heads and images of one product.

fp32 products on a GPU follow torch's setting at the time; `precision` is not read.

An infinity or NaN in a map reaches all queries of the tiles in whose halo it lies, not only those whose window it is
in.
"""

from .fused import attention, attention_backward
from .unfused import aggregate, aggregate_transpose, bias_gradient, similarity

__all__ = ["aggregate", "aggregate_transpose", "attention", "attention_backward", "bias_gradient", "similarity"]
