"""What runs a model here: the C++ kernels where they apply, MindSpore's graph elsewhere; and loading for either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.generation.runner import Runner
from parallel.common.errors import UserError
from parallel.training.settings import COMPUTE_DTYPES

if TYPE_CHECKING:
    from pangu.generation.kernel_runner import PackedWeights
    from pangu.model import PanGuAlpha
    from pangu.settings import Run


def kernels_for(config: Any, compute_dtype: str) -> Path | None:
    """The library with the C++ kernels if they can run a model of these sizes: on the CPU, in float32."""
    import mindspore

    from pangu.native import kernel_library

    fits = (mindspore.get_context("device_target") == "CPU" and compute_dtype == "float32"
            and config.softmax_dtype == "float32")
    return kernel_library() if fits else None


class Backend:
    """A model that text can be generated with.

    Args:
        source: a model, or weights of one. The C++ kernels take a copy of a model's parameters when they are first
            used.
    """

    has_cache = False
    """Whether its one runner has been made, with a cache that was measured then."""

    def __init__(self, source: PanGuAlpha | PackedWeights) -> None:
        self.config, self._source = source.config, source
        self._weights: Any = None
        self._runner: Runner | None = None
        self._key: tuple[int, ...] = ()

    def runner(self, sequences: int, tokens: int, chunk: int) -> Runner:
        """A runner whose cache holds this many sequences of this many tokens; the one before is kept if it does."""
        weights = self._packed()
        if weights is None:
            from pangu.generation.graph_runner import GraphRunner

            if self._key != (sequences, chunk):
                self._runner = None  # its memory first
                self._runner, self._key = GraphRunner(self._source, sequences, chunk), (sequences, chunk)
            return self._runner
        from pangu.generation.kernel_runner import SLOTS

        return self.kernel_runner(sequences * -(-tokens // SLOTS))

    def close(self) -> None:
        """Nobody generates with it any more: what other processes hold of it is given back."""

    def kernel_runner(self, blocks: int) -> Runner:
        """A runner of the C++ kernels with at least this many blocks."""
        from pangu.generation.kernel_runner import KernelRunner
        from pangu.native import kernel_library

        if self._runner is None or self._runner.blocks < blocks:
            self._runner = None
            self._runner = KernelRunner(self._packed(), blocks, kernel_library())
        return self._runner

    def _packed(self) -> Any:
        """The weights for the C++ kernels; None where they do not apply."""
        from pangu.generation.kernel_runner import PackedWeights
        from pangu.generation.weights import weights_of

        if self._weights is None:
            if isinstance(self._source, PackedWeights):
                self._weights = self._source
            elif kernels_for(self.config, str(self._source.compute_dtype).lower()) is not None:
                self._weights = weights_of(self._source)
        return self._weights


def load_backend(settings: Run, checkpoint: str | Path, int8: bool = False) -> Backend:
    """A run's model from a checkpoint (a run's folder means its newest), ready to generate, in one copy.

    Args:
        settings: a `pangu.settings.Run`.
        checkpoint: in float or, made by `quantize`, in int8.
        int8: whether a float one is quantized while it is loaded.

    Raises:
        UserError: no checkpoint, or one of another model.
    """
    from pangu.generation.weights import CheckpointWeights
    from parallel.checkpoint.folder import resolve_checkpoint

    path = resolve_checkpoint(checkpoint)
    if kernels_for(settings.model, COMPUTE_DTYPES[settings.train.precision]) is not None:
        return Backend(CheckpointWeights(settings.model, path, int8).packed())
    return Backend(load_model(settings, path, int8))


def load_model(settings: Run, checkpoint: str | Path, int8: bool = False) -> Any:
    """The `PanGuAlpha` of a run with the parameters of a checkpoint, for scoring or for `Backend`; see `load_backend`.

    In half precision matrices are kept in the type that they are multiplied in, so that no call casts them.
    """
    import mindspore as ms
    from mindspore.nn.utils import no_init_parameters

    from pangu import int8 as quantization
    from pangu.model import PanGuAlpha
    from parallel.checkpoint.folder import resolve_checkpoint
    from parallel.layers.int8 import prepare

    path = resolve_checkpoint(checkpoint)
    ms.set_context(mode=ms.GRAPH_MODE)
    with no_init_parameters():
        model = PanGuAlpha(settings.model, getattr(ms, COMPUTE_DTYPES[settings.train.precision]))
    quantization.load(path, model)
    if int8:
        if model.int8:
            raise UserError("is quantized already", where="--int8", value=str(path))
        quantization.fill(model, quantization.swap(model))
        prepare(model)
    keep_in_compute_dtype(model)
    model.set_train(False)
    return model


def keep_in_compute_dtype(model: Any) -> None:
    """Casts the float weights and biases of all linear layers, and the words', once and for all."""
    from mindspore import Parameter, Tensor
    from mindspore import dtype as mstype

    from parallel.layers.linear import Linear

    if model.compute_dtype == mstype.float32:
        return
    linears = [cell for _, cell in model.cells_and_names() if isinstance(cell, Linear)]
    places = [(linear, name) for linear in linears for name in ("weight", "bias") if getattr(linear, name) is not None]
    places += [] if model.int8 else [(model.embedding.word, "table")]
    for cell, name in places:
        old = getattr(cell, name)
        delattr(cell, name)
        setattr(cell, name, Parameter(Tensor(old.asnumpy()).astype(model.compute_dtype), name=old.name,
                                      requires_grad=False))
