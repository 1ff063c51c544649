"""Which operators do what: tables of `aten` names, the vocabulary of `bwsk.classification.operators`.

Names are those of operator packets without a trailing underscore: `add` stands for `aten::add` and `aten::add_`.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHAPE_ONLY = _names(
    "empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full new_empty_strided rand_like "
    "randn_like"
)
RANDOM = _names(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ uniform_ normal_ "
    "exponential_ normal multinomial random_ cauchy_ log_normal_ geometric_"
)
REARRANGE = _names(
    "view _unsafe_view reshape _reshape_alias permute transpose t numpy_T mT unsqueeze squeeze flatten unflatten "
    "clone contiguous detach detach_ alias lift_fresh expand expand_as repeat cat stack split split_with_sizes "
    "chunk unbind tensor_split roll flip constant_pad_nd pixel_shuffle pixel_unshuffle view_as_real "
    "view_as_complex unsafe_split unsafe_split_with_sizes unsafe_chunk movedim swapaxes repeat_interleave "
    "unsqueeze_ squeeze_ transpose_ t_ resolve_conj resolve_neg conj _conj broadcast_to hstack vstack concat "
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d view_copy transpose_copy "
    "_nested_view_from_buffer channel_shuffle"
)
SELECT = _names(
    "slice select narrow index index_select gather masked_select diagonal tril triu tril_ triu_ as_strided take "
    "unfold nonzero unique_dim _unique2 bincount histc take_along_dim"
)
INJECTIVE = _names(
    "exp exp2 log log2 log10 log1p expm1 sqrt rsqrt reciprocal neg negative sinh atan asinh atanh acosh erf erfc "
    "erfinv softplus leaky_relu elu celu prelu _prelu_kernel logit log_sigmoid_forward bitwise_not"
)
ERASING = _names(
    "abs absolute square sin cos cosh hardtanh hardswish hardsigmoid clamp clamp_min clamp_max sign sgn floor "
    "ceil round trunc frac mish threshold softshrink hardshrink relu6 sinc heaviside fmod remainder floor_divide "
    "glu lgamma tan logical_not"
)
NAMED = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "nan_to_num": "identity",  # on finite numbers
    "embedding": "embedding",
    "sort": "sorting",
    "topk": "routing",
    "argmax": "routing",
    "argmin": "routing",
    "argsort": "routing",
    "cumsum": "prefix_sum",
    "logcumsumexp": "prefix_sum",
    "index_add": "merge",
    "scatter_add": "merge",
    "scatter_reduce": "merge",
    "index_reduce": "merge",
    "einsum": "product",
    "lstm": "recurrent",
    "gru": "recurrent",
    "rnn_tanh": "recurrent",
    "rnn_relu": "recurrent",
    "_thnn_fused_lstm_cell": "recurrent",
    "_thnn_fused_gru_cell": "recurrent",
    "mkldnn_rnn_layer": "recurrent",
    "_cudnn_rnn": "recurrent",
}
ARITHMETIC = _names("add sub rsub subtract mul multiply div divide true_divide lerp addcmul addcdiv")
PAIRWISE = _names("maximum minimum max min fmax fmin pow atan2 fmod remainder floor_divide hypot logaddexp bitwise_xor")
UNDONE = _names(
    "logaddexp bitwise_xor"
)  # those inverted with a known second operand; pow and atan2 depend on its values
REDUCE = _names(
    "sum nansum mean amax amin aminmax max min prod var std var_mean std_mean logsumexp norm linalg_vector_norm "
    "any all count_nonzero median mode trace _local_scalar_dense item equal is_nonzero cumprod cummax cummin"
)
OF_ONE = _names("sum mean amax amin max min prod logsumexp")  # those that return a single element unchanged
TO_PYTHON = _names("_local_scalar_dense item equal is_nonzero")
LOOKUP = _names("index_select index gather take take_along_dim")  # rows of a table that is not an activation
COMPARE = _names(
    "eq ne lt gt le ge isnan isinf isfinite logical_and logical_or logical_xor bitwise_and bitwise_or __and__ "
    "__or__ isin bucketize searchsorted is_same_size"
)
MASK = _names(
    "masked_fill where index_put _index_put_impl scatter masked_scatter index_fill index_copy fill select_scatter "
    "slice_scatter diagonal_scatter zero fill_diagonal select_backward"
)
POOL = _names(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d "
    "avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d "
    "adaptive_max_pool1d max_pool1d_with_indices mkldnn_max_pool2d lp_pool2d"
)
LOSS = _names(
    "nll_loss nll_loss_forward nll_loss2d_forward nll_loss_nd cross_entropy_loss mse_loss l1_loss smooth_l1_loss "
    "huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div soft_margin_loss multi_margin_loss "
    "_ctc_loss ctc_loss linear_cross_entropy cosine_embedding_loss"
)
MATMUL = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "matmul": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmv": (1, 2),
    "_grouped_mm": (0, 1),
    "addbmm": (1, 2),
    "_scaled_mm": (0, 1),
}
BATCH_NORM = {  # name -> position of the training flag (None: never trains)
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "_native_batch_norm_legit_functional": 5,
    "batch_norm": 5,
    "cudnn_batch_norm": 5,
    "miopen_batch_norm": 5,
    "_batch_norm_with_update": None,
    "_native_batch_norm_legit_no_training": None,
    "_batch_norm_with_update_functional": None,
    "_batch_norm_no_update": None,
}
