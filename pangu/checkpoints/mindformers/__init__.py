"""PanGu-alpha inside MindFormers 1.9.0, which dropped it after 1.3: config, model and tokenizer for its Auto classes,
its text generation pipeline and its Trainer.

    from pangu.checkpoints.mindformers import register
    register()
    model = mindformers.AutoModelForCausalLM.from_config(PanGuAlphaConfig(...))

The network is `pangu.model.PanGuAlpha` with its own parameter names, so a checkpoint of `pangu train` is one of
MindFormers. The modules `config`, `model` and `tokenizer` import MindFormers; `register` alone imports them.
docs/evaluation.md lists what that package can do on a CPU.
"""

from __future__ import annotations

from functools import cache

from pangu.checkpoints.mindformers.names import MODEL_TYPE, to_model_config, to_parallel_config
from parallel.common.errors import UserError

__all__ = ["MODEL_TYPE", "register", "to_model_config", "to_parallel_config"]


@cache
def register() -> tuple[type, type, type]:
    """Registers and returns (PanGuAlphaConfig, PanGuAlphaForCausalLM, PanGuAlphaTokenizer); once is enough.

    Raises:
        UserError: mindformers is not installed.
    """
    try:
        from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
        from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
    except ImportError:
        raise UserError("this needs the package mindformers",
                        hint="pip install 'pangu-rankers[mindformers]'") from None
    from pangu.checkpoints.mindformers.config import PanGuAlphaConfig
    from pangu.checkpoints.mindformers.model import PanGuAlphaForCausalLM, train_cell
    from pangu.checkpoints.mindformers.tokenizer import PanGuAlphaTokenizer

    for kind, cls in ((MindFormerModuleType.CONFIG, PanGuAlphaConfig),
                      (MindFormerModuleType.MODELS, PanGuAlphaForCausalLM),
                      (MindFormerModuleType.TOKENIZER, PanGuAlphaTokenizer),
                      (MindFormerModuleType.WRAPPER, train_cell())):
        MindFormerRegister.register_cls(cls, kind)
    AutoConfig.register(MODEL_TYPE, PanGuAlphaConfig)
    AutoModel.register(PanGuAlphaConfig, PanGuAlphaForCausalLM)
    AutoModelForCausalLM.register(PanGuAlphaConfig, PanGuAlphaForCausalLM)
    AutoTokenizer.register(PanGuAlphaConfig, slow_tokenizer_class=PanGuAlphaTokenizer)
    return PanGuAlphaConfig, PanGuAlphaForCausalLM, PanGuAlphaTokenizer
