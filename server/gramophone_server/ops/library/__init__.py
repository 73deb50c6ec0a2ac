"""Every op of `functional` again, through torch's library alone: without a kernel of this project.

The signatures, the semantics and the types are those of `functional`. These versions are slower and take more memory.
They have two uses:

- For an op whose kernel is wrong on this device, `functional` calls the version here (`self_test` decides). So nothing
  here waits for the device or depends on the values of a tensor: a CUDA graph captures it, and on the meta device it
  shows the memory that it takes.
- For float64 arguments every step is float64, so the same function is the reference of the kernels' self-test.

These versions check no arguments. Autograd differentiates the ones that have gradients as it does torch's ops.

16-bit features are summed in float32. Temporary tensors are at most some float32 copies of one argument.
"""

from gramophone_server.ops.library.layers import (
    bias_relu_,
    bias_relu_pool,
    first_layer,
    first_layer_bwd,
    max_pool,
    max_pool_bwd,
    pool_codes_bwd,
)
from gramophone_server.ops.library.optimisers import (
    adam_,
    check_finite_,
    descent_,
    lbfgs_,
)
from gramophone_server.ops.library.style import (
    gram,
    style_bwd_,
    style_fwd,
    style_loss,
)
from gramophone_server.ops.library.terms import (
    content_,
    tv_,
    tv_check_finite_,
)

__all__ = [
    "adam_",
    "bias_relu_",
    "bias_relu_pool",
    "check_finite_",
    "content_",
    "descent_",
    "first_layer",
    "first_layer_bwd",
    "gram",
    "lbfgs_",
    "max_pool",
    "max_pool_bwd",
    "pool_codes_bwd",
    "style_bwd_",
    "style_fwd",
    "style_loss",
    "tv_",
    "tv_check_finite_",
]
