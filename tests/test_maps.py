"""Views between maps and heads: the channel order, never a copy, and the memory formats of results."""

import pytest
import torch

from image_local_attention import maps
from problems import LAYOUTS, lay_out


@pytest.fixture(params=LAYOUTS)
def laid_out(request):
    return lay_out(torch.randn(3, 12, 4, 5), request.param)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12])
def test_component_d_of_head_h_is_channel_h_times_depth_plus_d(laid_out, heads):
    split = maps.split_heads(laid_out, heads)
    depth = 12 // heads
    assert split.shape == (3, heads, 4, 5, depth)
    for head in range(heads):
        for component in range(depth):
            assert torch.equal(split[:, head, :, :, component], laid_out[:, head * depth + component])


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_heads_are_a_view_and_merge_back_into_one(laid_out, heads):
    split = maps.split_heads(laid_out, heads)
    merged = maps.merge_heads(split)
    for view in (split, merged):
        assert view.untyped_storage().data_ptr() == laid_out.untyped_storage().data_ptr()
        assert view.storage_offset() == laid_out.storage_offset()
    assert merged.shape == laid_out.shape
    assert merged.stride() == laid_out.stride()


@pytest.mark.parametrize("size", [(0, 5), (4, 0)])
def test_maps_without_pixels_split_and_merge(size):
    x = torch.randn(2, 6, *size)
    assert maps.split_heads(x, 2).shape == (2, 2, *size, 3)
    assert maps.merge_heads(maps.split_heads(x, 2)).shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_channels_last_stays_what_it_is(layout):
    x = lay_out(torch.randn(3, 12, 4, 5), layout)
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert maps.memory_format(x) == wanted
    empty = maps.empty_map(x, 7)
    assert empty.shape == (3, 7, 4, 5)
    assert empty.is_contiguous(memory_format=wanted)
    assert (empty.dtype, empty.device) == (x.dtype, x.device)


def test_a_map_that_is_both_stays_contiguous():
    one_channel = torch.randn(2, 1, 4, 5)
    assert one_channel.is_contiguous(memory_format=torch.channels_last)
    assert maps.memory_format(one_channel) == torch.contiguous_format


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_empty_heads_lie_in_a_fresh_map(layout):
    x = lay_out(torch.randn(3, 12, 4, 5), layout).half()
    heads = maps.empty_heads(maps.split_heads(x, 3), 7)
    assert heads.shape == (3, 3, 4, 5, 7)
    assert heads.dtype == torch.float16
    merged = maps.merge_heads(heads)
    assert merged.untyped_storage().data_ptr() == heads.untyped_storage().data_ptr()
    assert merged.is_contiguous(memory_format=maps.memory_format(x))


def test_sums_are_fp32_at_least():
    wide = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}
    assert {dtype: 8 * maps.accumulator(dtype).itemsize for dtype in wide} == wide
