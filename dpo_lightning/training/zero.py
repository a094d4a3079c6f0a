"""DeepSpeed's ZeRO behind Lightning's strategy, on GPUs and on CPU ranks. Each override has its reason beside it.

Importing this imports deepspeed: `training/strategy.py` does so where ZeRO is asked for.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from dpo_lightning.model.reference import Offloaded
from dpo_lightning.training.shards import Shards


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO 1, 2 or 3: optimizer states, gradients, weights sharded over the ranks, of GPUs or of CPU processes.

    Checkpoints hold whole tensors in the same form as those of a single process: any strategy and any number of
    ranks can go on from them.
    """

    def __init__(self, stage: int, *, offload: bool, pairs: int):
        super().__init__(
            stage=stage, offload_optimizer=offload, offload_parameters=offload, logging_batch_size_per_gpu=pairs
        )
        # The client's AdamW also works on offloaded states; DeepSpeed's own would have to be compiled.
        self.config["zero_force_ds_cpu_optimizer"] = False  # type: ignore[index]
        self._hf_config: Any = None
        self._shards: Shards | None = None
        self._loss = 0.0
        self._spike: bool | None = None  # until it is known of this step

    # Lightning refuses anything but CUDA, and compares device numbers that CPU ranks do not have.

    def setup_environment(self) -> None:
        """Start the ranks' talk."""
        Strategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Do as Lightning does, without its check of device numbers where there are none."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        clear_stale_locks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:  # fmt: skip
        """Do as Lightning does, with this rank for a device number, and remember the parameters' order."""
        assert optimizer is not None
        groups = [list(group["params"]) for group in optimizer.param_groups]
        engine = self._initialize(model, self.config, optimizer, [p for group in groups for p in group], lr_scheduler)
        self._shards = Shards(engine, groups)
        optimizer.step = self._unless_spike(optimizer.step)
        return engine, engine.optimizer

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Shard as for the training, without an optimizer: a validation by itself."""
        remove_module_hooks(model)  # those of the training's engine
        config = {key: value for key, value in self.config.items() if key != "gradient_clipping"}  # type: ignore[union-attr]
        self.model = self._initialize(model, config if self.zero_stage_3 else _precision_of(config), None, [], None)

    def _initialize(self, model: nn.Module, config: Any, optimizer: Any, parameters: Any, lr_scheduler: Any) -> Any:
        import deepspeed

        engine = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank), config=config, model=model, optimizer=optimizer,
            model_parameters=parameters, lr_scheduler=lr_scheduler, dist_init_required=False,
        )[0]  # fmt: skip
        if engine.bfloat16_enabled():  # it casts the parameters it sees; an offloaded reference shows none
            for module in model.modules():
                if isinstance(module, Offloaded):
                    module.cast(torch.bfloat16)
        return engine

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let transformers shard at loading under ZeRO-3, and nothing else.

        Lightning's own context would also shard adapters at their birth, and PEFT's initial values would miss them:
        B would not be zero. transformers keeps a weak reference to the config, hence the attribute.
        """
        self._init_config_if_needed()
        if self.zero_stage_3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            self._hf_config = HfDeepSpeedConfig(self.config)
        yield

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Keep DeepSpeed from dividing by the accumulation: Lightning has done so already."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, unless a loss is not finite; hand the module the norm of the gradients before they were clipped.

        DeepSpeed sees a gradient that is not finite by itself and leaves the update out. It would go on.
        """
        module: Any = self.lightning_module
        engine = self.deepspeed_engine
        skipped, updates = engine.skipped_steps, engine.is_gradient_accumulation_boundary()

        def guarded() -> Any:
            result = closure()
            if updates:
                self._loss, self._spike = module.guard.check(module.trainer), None
            return result

        result = super().optimizer_step(optimizer, guarded, model, **kwargs)
        module.grad_norm = engine.get_global_grad_norm()
        if engine.skipped_steps > skipped:
            module.guard.stop(module.trainer, "the gradient")
        if updates:
            module.guard.clear()
        return result

    def _unless_spike(self, update: Callable[[], Any]) -> Callable[[], Any]:
        """Return AdamW's step without spikes: DeepSpeed calls it once for each group, and knows the norm by then."""

        @functools.wraps(update)
        def step() -> Any:
            if self._spike is None:
                zero, module = (cast(Any, each) for each in (self.deepspeed_engine.optimizer, self.lightning_module))
                self._spike = module.leaves_out(self._loss, zero._global_grad_norm)
            return None if self._spike else update()

        return step

    def on_train_end(self) -> None:
        """Leave the first rank the trained weights, whole, in float32: what is exported."""
        module: Any = self.lightning_module
        whole = self.lightning_module_state_dict()
        module.whole = whole if self.is_global_zero else None

    def teardown(self) -> None:
        """Let go of the engine, and let transformers load whole models again."""
        if self.zero_stage_3 and self._shards is not None:
            self._shards.zero._partition_all_parameters()  # gathered ones would go to the CPU, and be used from there
        super().teardown()
        self._hf_config = self._shards = None

    # Checkpoints: whole tensors, gathered by all ranks and written by the first, as without DeepSpeed.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the trained weights, whole, in float32, on the CPU; on the first rank, {} on others. Collective."""
        assert self._shards is not None
        assert self.lightning_module is not None
        names = {id(p): name for name, p in self.lightning_module.named_parameters()}
        whole = self._shards.weights(keep=self.is_global_zero)
        return {names[id(p)]: tensor for p, tensor in whole}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return what torch's AdamW would, whole, on the CPU; on the first rank, {} on others. Collective."""
        assert self._shards is not None
        return self._shards.optimizer_state(keep=self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint from the first rank, as any strategy does."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint's file; Lightning forgets that only weights are to be unpickled."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return that Lightning restores the optimizer."""
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every rank its part of the trained weights."""
        assert self._shards is not None
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        self._shards.load_weights([(parameters[name], value) for name, value in checkpoint["state_dict"].items()])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its part of Adam's moments."""
        assert self._shards is not None
        assert self.lightning_module is not None
        self._shards.load_optimizer_state(checkpoint["optimizer_states"][0])
        if self.lightning_module.trainer.fit_loop.done:  # the run had ended; its training will not, a second time
            self.on_train_end()


def clear_stale_locks(after: float = 600.0) -> None:
    """Remove locks of compilations that were killed: torch would wait for them for ever.

    DeepSpeed has an operation compiled when ranks first talk over CPUs, in less than a minute; a lock that is older
    than `after` seconds is nobody's.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")]:
        with suppress(FileNotFoundError):  # another rank was faster
            if time.time() - lock.stat().st_mtime > after:
                lock.unlink()
                print(f"removed {lock}: the compilation that held it is over")


def _precision_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of DeepSpeed's config that an engine without optimizer and shards takes."""
    kept = ("train_micro_batch_size_per_gpu", "fp16", "bf16")
    return {key: config[key] for key in kept if key in config}
