"""Replays of whole models: logits under every mask, hidden states, router, one mixture block, gradients.

A folder is read as any user's model folder would be (config.json, safetensors, our table of weights) and run
through views, so weight order, rotary positions, masks and the final norm all have to be right. The
folder's own masks are compared with our rendering of the context they stand for, block sizes are read off
them. Outputs of padded queries mean nothing (the reference's are NaN or arbitrary): they are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tide_megatron.platform import start_distributed, stop_distributed

import torch
import torch.distributed as dist
from torch import Tensor

from goldens.engine import EVERYBODY, Context, View, block_diffusion, dense_mask, swap_halves
from goldens.row import LOGIT_TOLERANCE, Golden, Row, error_of
from tide_megatron.base.device import Device
from tide_megatron.diffusion.segments import Segments
from tide_megatron.models import Architecture
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.params import hf_shapes
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import hf_tensors, load_model, read_architecture
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

CAUSAL = Context(kind="block_causal", block_size=1)
FILES = ("config.json", "model.safetensors", "shapes.json", "io.npz")


def replay_models(folder: Path) -> list[Row]:
    """Replay one model folder: io.npz through the loaded model, shapes.json against our table of weights."""
    for name in FILES:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder.name}/{name}")
    golden = Golden(folder / "io.npz", name=f"{folder.name}/io.npz")
    with one_rank_world():
        replayed = Replayed(folder, golden)
        replayed.shapes()
        replayed.block_diffusion()
        replayed.single_parts()
        replayed.causal()
        replayed.gradients()
        if "hidden_0" in golden:
            replayed.inside()
            replayed.mixture_block()
    return golden.rows()


@contextlib.contextmanager
def one_rank_world() -> Iterator[None]:
    """Run a block in a world of one rank, unless there is a world already."""
    if dist.is_initialized():
        yield
        return
    start_distributed(Device(type="cpu", index=0, backend="gloo", threads=1))
    try:
        yield
    finally:
        stop_distributed()


def view_of(
    ids: Tensor, context: Context, positions: Tensor | None = None, segments: Segments | None = None
) -> View:
    """Ask for every position of `ids` [samples, parts * length]."""
    length = ids.shape[1] // context.parts
    plain = torch.arange(length).repeat(context.parts).expand(len(ids), -1)
    return View(
        ids=ids,
        positions=plain if positions is None else positions,
        context=context,
        length=length,
        segments=segments,
        rows=torch.arange(ids.numel()),
    )


class Replayed:
    """One golden folder, loaded, with the rows it gives."""

    def __init__(self, folder: Path, golden: Golden) -> None:
        """Load the folder's weights into a trainable fp32 model."""
        self.folder, self.golden = folder, golden
        self.model = _loaded(read_architecture(folder), folder)

    @torch.no_grad()
    def logits(self, view: View, model: TideModel | None = None) -> Tensor:
        """Return the logits that predict all positions, [samples, tokens, vocabulary]."""
        model = model or self.model
        return (model.rows(view) @ model.head_weight.T).view(*view.ids.shape, -1)

    def shapes(self) -> None:
        """Compare shapes.json with our table."""
        told = json.loads((self.folder / "shapes.json").read_text(encoding="utf-8"))
        ours = {name: list(shape) for name, shape in hf_shapes(self.model.architecture).items()}
        wrong = sorted(name for name in {*told, *ours} if told.get(name) != ours.get(name))
        # The reference lists parameters; the router bias is a buffer in it.
        wrong = [name for name in wrong if name in told or not name.endswith("expert_bias")]
        self.golden.add("shapes.json", "failed" if wrong else "replayed", note=", ".join(wrong))

    def check_mask(self, key: str, golden: Tensor, ours: Tensor, keep: Tensor | None = None) -> None:
        """Compare a mask of the folder with our rendering, on the queries of real tokens."""
        golden, ours = torch.broadcast_tensors(golden, ours)
        same = golden == ours
        wrong = int((~same).sum() if keep is None else (~same[:, 0][keep]).sum())
        self.golden.add(
            key, "failed" if wrong else "replayed", note=f"{wrong} entries differ" if wrong else ""
        )

    def compare_real(self, key: str, ours: Tensor, real: Tensor) -> None:
        """Compare outputs [samples, tokens, ...] of real tokens."""
        error = error_of(ours[real], self.golden.read(key)[real])
        status = "replayed" if error <= LOGIT_TOLERANCE else "failed"
        self.golden.add(key, status, error=error, note="padded queries left out")

    def block_diffusion(self) -> None:
        """Replay [x_t ; x_0] (and [x_0 ; x_t], whose halves we swap) under the folder's own positions."""
        golden = self.golden
        if "block_size" not in golden:
            return
        context = block_diffusion(int(golden.read("block_size")))
        if "bd3lm_mask" in golden:
            ids = golden.read("ids")
            self.check_mask("bd3lm_mask", golden.read("bd3lm_mask"), dense_mask(context, ids.shape[1] // 2))
            logits = self.logits(view_of(ids, context, positions=golden.read("position_ids")))
            golden.compare_logits("logits_bd3lm", logits)
        for order in [key.removesuffix("ids") for key in golden.keys("(xt_x0|x0_xt)_ids")]:
            clean_first = order == "x0_xt_"
            ordered = _swap_tokens if clean_first else torch.clone
            ids, positions = ordered(golden.read(f"{order}ids")), ordered(golden.read("position_ids"))
            ours = dense_mask(context, ids.shape[1] // 2)
            self.check_mask(
                f"{order}mask", golden.read(f"{order}mask"), swap_halves(ours) if clean_first else ours
            )
            logits = self.logits(view_of(ids, context, positions=positions))
            pairs = {f"{order}logits": ordered(logits), f"{order}xt_logits": logits[:, : ids.shape[1] // 2]}
            golden.compare(f"{order}*logits", pairs, LOGIT_TOLERANCE)

    def single_parts(self) -> None:
        """Replay single sequences that everybody may see: unmasked, padded by 2-D and by 4-D masks."""
        golden = self.golden
        if not golden.keys("logits_(nomask|bidir|shifted|mask2d)"):
            return
        ids = golden.read("bidir_ids" if "bidir_ids" in golden else "ids")
        if self.model.architecture.is_shifted:
            plain = _loaded(dataclasses.replace(self.model.architecture, is_shifted=False), self.folder)
            golden.compare_logits("logits_bidir_unshifted", self.logits(view_of(ids, EVERYBODY), plain))
        for key in golden.keys("logits_(nomask|bidir|shifted)"):
            golden.compare_logits(key, self.logits(view_of(ids, EVERYBODY)))
        if "logits_mask2d" in golden:
            real, segments = _padding(golden.read("mask2d"))
            self.compare_real("logits_mask2d", self.logits(view_of(ids, EVERYBODY, segments=segments)), real)
        if "mask4d_trainer" in golden:
            allowed = golden.read("mask4d_trainer") == 0
            real, segments = _padding(allowed[:, 0].any(dim=-1))
            self.check_mask(
                "mask4d_trainer",
                allowed,
                dense_mask(EVERYBODY, ids.shape[1], segments.numbers(*ids.shape)),
                real,
            )
            logits = self.logits(view_of(ids, EVERYBODY, segments=segments))
            self.compare_real("logits_mask4d_trainer", logits, real)

    def causal(self) -> None:
        """Replay block-causal masks, and plain causal ones as blocks of one token."""
        golden = self.golden
        if "mask4d_blockcausal" in golden:
            ids, allowed = golden.read("ids"), golden.read("mask4d_blockcausal") == 0
            context = Context(kind="block_causal", block_size=int(allowed[0, 0, 0].sum()))
            self.check_mask("mask4d_blockcausal", allowed, dense_mask(context, ids.shape[1]))
            golden.compare_logits("logits_blockcausal", self.logits(view_of(ids, context)))
        if "logits_mask2d_is_causal" in golden:
            ids, (real, segments) = golden.read("ids"), _padding(golden.read("mask2d"))
            logits = self.logits(view_of(ids, CAUSAL, segments=segments))
            self.compare_real("logits_mask2d_is_causal", logits, real)
        if "logits_native_causal" in golden:
            golden.compare_logits(
                "logits_native_causal", self.logits(view_of(golden.read("causal_ids"), CAUSAL))
            )

    def gradients(self) -> None:
        """Replay the summed NLL of masked tokens over all positions, and its gradient in every weight."""
        golden = self.golden
        if "loss" not in golden:
            return
        ids, hidden = golden.read("ids"), golden.read("mask")
        samples, length = hidden.shape
        view = view_of(ids, block_diffusion(int(golden.read("block_size"))))
        sample, position = hidden.nonzero(as_tuple=True)
        view = dataclasses.replace(view, rows=sample * ids.shape[1] + position)
        logits = self.model.rows(view) @ self.model.head_weight.T
        gold = ids[:, length:][hidden]
        loss = torch.nn.functional.cross_entropy(logits, gold, reduction="sum") / (samples * length)
        loss.backward()
        golden.compare("loss", {"loss": loss})
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        ours = {f"grad:{name}": value for name, value in hf_tensors(self.model, gradients).items()}
        golden.compare(f"grad:* ({len(ours)} weights)", ours)

    def inside(self) -> None:
        """Replay hidden states after every layer, and each router's logits and choices, on unmasked input."""
        golden, model = self.golden, self.model
        ids = golden.read("ids")
        seen: dict[str, Tensor] = {}
        watched = {"hidden_0": model.embedding, f"hidden_{len(model.decoder.layers)}": model.decoder}
        for index, layer in enumerate(model.decoder.layers[:-1], start=1):
            watched[f"hidden_{index}"] = layer
        mixtures = [i for i in range(len(model.decoder.layers)) if model.architecture.is_mixture(i)]
        with contextlib.ExitStack() as hooks:
            for key, module in watched.items():
                hooks.callback(module.register_forward_hook(_keep(seen, key)).remove)
            for index in mixtures:
                router = model.decoder.layers[index].mlp.router
                hooks.callback(router.register_forward_hook(_keep_choice(seen, index)).remove)
            self.logits(view_of(ids, EVERYBODY))
        states = {key: _by_sample(seen[key], ids) for key in golden.keys(r"hidden_\d+")}
        golden.compare("hidden_*", states, LOGIT_TOLERANCE)
        scores = {f"router_logits_{i}": _by_sample(seen[f"logits_{i}"], ids) for i in mixtures}
        golden.compare("router_logits_*", scores, LOGIT_TOLERANCE)
        for index in mixtures:
            self._compare_choice(f"topk_idx_{index}", _by_sample(seen[f"choice_{index}"], ids))

    @torch.no_grad()
    def mixture_block(self) -> None:
        """Replay the first mixture layer alone: scores, choice, weights, output."""
        golden = self.golden
        experts = self.model.architecture.experts
        assert experts is not None, "only mixtures have this"
        block = self.model.decoder.layers[experts.first_layer].mlp
        given = golden.read("moe_in").transpose(0, 1).contiguous()  # [tokens, 1, hidden]
        logits = block.router.gating(given)
        weights, choice = block.router.routing(logits)
        golden.compare_logits("moe_router_logits", logits.transpose(0, 1))
        picked = weights.gather(1, golden.read("moe_topk_idx"))
        self._compare_choice("moe_topk_idx", choice)
        golden.compare_logits("moe_topk_weight", picked)
        out = block(given)[0].transpose(0, 1)
        golden.compare("moe_out*", {"moe_out": out, "moe_out_trainpath": out}, LOGIT_TOLERANCE)

    def _compare_choice(self, key: str, choice: Tensor) -> None:
        """Compare which experts were chosen; their order within a token does not matter."""
        golden = self.golden.read(key)
        same = torch.equal(torch.zeros_like(choice).scatter(-1, golden, True), choice)
        self.golden.add(key, "replayed" if same else "failed", note="" if same else "other experts chosen")


def _loaded(architecture: Architecture, folder: Path) -> TideModel:
    """Build a trainable fp32 model on this rank and fill it from a folder."""
    device = Device(type="cpu", index=0, backend="gloo", threads=1)
    model = build_model(architecture, make_groups(Layout()), ModelOptions(device=device, trainable=True))
    load_model(model, folder)
    return model


def _swap_tokens(value: Tensor) -> Tensor:
    """Swap the halves of [samples, 2 * length, ...]."""
    return value.roll(value.shape[1] // 2, dims=1)


def _by_sample(value: Tensor, ids: Tensor) -> Tensor:
    """Put samples first: [tokens, samples, ...] turns, the last layer's [rows, 1, ...] unfolds."""
    return value.view(*ids.shape, -1) if len(value) == ids.numel() else value.transpose(0, 1)


def _padding(mask: Tensor) -> tuple[Tensor, Segments]:
    """Return (real tokens [samples, tokens] bool, segments that hide the others) of a right-padded mask."""
    real = mask.bool()
    lengths = real.sum(dim=1)
    assert torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None]), "padding must be on the right"
    return real, Segments.of_rows(lengths)


def _keep(seen: dict[str, Tensor], key: str) -> Callable[..., None]:
    def hook(module: torch.nn.Module, given: object, answer: Tensor | tuple[Tensor, ...]) -> None:
        seen[key] = answer[0] if isinstance(answer, tuple) else answer

    return hook


def _keep_choice(seen: dict[str, Tensor], index: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, given: tuple[Tensor, ...], answer: tuple[Tensor, Tensor]) -> None:
        logits = module.gating(given[0])
        seen[f"logits_{index}"], seen[f"choice_{index}"] = logits, answer[1].view(logits.shape)

    return hook
