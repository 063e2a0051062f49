"""Say what each of torch's operations makes of labels and zeros.

`RULES` has a row for each operation of ATen: its name without a last underscore, and a function of a `Call`
that returns the `Axes` of its result. Operations that torch itself calls pointwise need no row; what passes
one that has none stays. A rule may know fewer zeros than there are, and bind more than it must."""
import torch

from fasterai.deploy import alongs, calls, products, views
from fasterai.deploy.axes import plain
from fasterai.deploy.calls import Call


def follow(
    call: Call,
) -> list:  # of `Axes`, one for the first result, or for each
    "Return the axes of the results of a call."
    rule = RULES.get(call.name) if call.func.namespace in ('aten', 'prims') else None
    if rule is None and torch.Tag.pointwise in call.func.tags: rule = calls.pointwise
    try: found = (rule or calls.other)(call)
    except (AttributeError, LookupError, TypeError, ValueError): found = calls.other(call)  # an unusual call
    return found if isinstance(found, list) else [found]


def _number(call): return plain(call.shape, True)


def _rows(names, rule): return dict.fromkeys(names.split(), rule)


RULES = {
    **_rows('clone alias detach _to_copy lift_fresh contiguous positive view_as _conj', calls.pointwise),
    **_rows('hardswish hardtanh relu6 hardsigmoid _softplus nan_to_num', calls.pointwise),
    **_rows('mul multiply', calls.multiplication),
    **_rows('div divide true_divide _prelu_kernel prelu rrelu_with_noise', calls.first_decides),
    **_rows('native_dropout', calls.first_decides),
    **_rows('masked_fill', calls.masked),
    **_rows('addcmul', calls.addcmul),
    **_rows('where', calls.where),
    **_rows('copy', calls.copy),
    **_rows('fill zero', calls.fill),
    **_rows('zeros ones full empty arange rand randn scalar_tensor eye linspace new_zeros', calls.made),
    **_rows('new_ones new_empty new_full zeros_like ones_like full_like empty_like rand_like', calls.made),
    **_rows('randn_like new_empty_strided empty_strided randint randperm', calls.made),
    **_rows('bernoulli normal uniform exponential random', calls.drawn),
    **_rows('mm bmm', products.linear),
    **_rows('addmm baddbmm', products.linear_with_bias),
    **_rows('mv', products.vector),
    **_rows('convolution', products.convolution),
    **_rows('embedding', products.embedding),
    **_rows('_scaled_dot_product_flash_attention_for_cpu', products.attention),
    **_rows('_scaled_dot_product_flash_attention', products.attention),
    **_rows('_scaled_dot_product_efficient_attention', products.attention),
    **_rows('_scaled_dot_product_cudnn_attention', products.attention),
    **_rows('_scaled_dot_product_fused_attention_overrideable', products.attention),
    **_rows('native_batch_norm cudnn_batch_norm miopen_batch_norm', alongs.batch_norm),
    **_rows('_native_batch_norm_legit _native_batch_norm_legit_no_training', alongs.batch_norm),
    **_rows('native_layer_norm _fused_rms_norm', alongs.layer_norm),
    **_rows('native_group_norm', alongs.group_norm),
    **_rows('_softmax _log_softmax _safe_softmax', alongs.softmax),
    **_rows('roll flip cumsum cumprod', alongs.keeps_others),
    **_rows('mean sum amax amin var std linalg_vector_norm any all prod', alongs.reduction),
    **_rows('max_pool1d max_pool1d_with_indices avg_pool1d _adaptive_avg_pool1d', alongs.over_space(1)),
    **_rows('upsample_nearest1d upsample_linear1d adaptive_max_pool1d', alongs.over_space(1)),
    **_rows('reflection_pad1d replication_pad1d', alongs.over_space(1)),
    **_rows('max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d', alongs.over_space(2)),
    **_rows('adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d', alongs.over_space(2)),
    **_rows('upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa', alongs.over_space(2)),
    **_rows('_upsample_bicubic2d_aa reflection_pad2d replication_pad2d', alongs.over_space(2)),
    **_rows('max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d', alongs.over_space(3)),
    **_rows('adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d', alongs.over_space(3)),
    **_rows('reflection_pad3d replication_pad3d', alongs.over_space(3)),
    **_rows('constant_pad_nd', alongs.pad),
    **_rows('view _unsafe_view reshape _reshape_alias unsqueeze squeeze flatten unflatten', views.view),
    **_rows('permute', views.permute),
    **_rows('transpose t', views.transpose),
    **_rows('expand', views.expand),
    **_rows('repeat', views.repeat),
    **_rows('index_select', views.chosen),
    **_rows('select', views.select),
    **_rows('unbind', views.unbind),
    **_rows('slice', views.sliced),
    **_rows('split split_with_sizes unsafe_split unsafe_split_with_sizes', views.parts),
    **_rows('split_with_sizes_copy', views.parts),
    **_rows('cat', views.cat),
    **_rows('stack', views.stack),
    **_rows('glu', views.glu),
    **_rows('index', views.index),
    **_rows('pixel_shuffle', views.pixel_shuffle),
    **_rows('_local_scalar_dense is_nonzero equal', _number),
}
