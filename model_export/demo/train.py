"""Train the demo checkpoint: `python -m model_export.demo.train --out DIR --seed 0`.

Two phases. The next-token loss alone leaves the encoder at chance, so the encoder is first
trained by itself on what is in each cell, with linear heads that are dropped afterwards. Then,
its features computed once for a pool of scenes, the projector and the language model are trained
on the answers. The last part of that sees weights rounded as affine quantization rounds them, so
that the answers survive 4 bits.

Reproducible from the seed on one machine and number of threads.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model_export.demo import tokenizer as demo_tokenizer
from model_export.demo.model import DemoModel, make_config, to_pixels
from model_export.demo.packing import answer_loss, collate
from model_export.demo.rounding import rounded
from model_export.demo.targets import HEADS, cell_targets, word_targets
from model_export.encoder.reference import FastViTHD, Reparam
from model_export.samples.scenes import Question, Scene, Score, generate, held_out, score

# Peak learning rates: of the matrices (Muon) and of everything else (AdamW).
PEAK_MATRICES, PEAK_REST = 2e-3, 3e-3


def images(batch: list[Scene], rng: random.Random, size: int) -> Tensor:
    """Scenes as the encoder meets them, [B, 3, S, S]: some drawn larger and reduced, some noisy."""
    drawn = []
    for scene in batch:
        scale = rng.choice((1, 1, 1, 1, 1, 2, 2, 4))
        image = scene.draw(size * scale)
        if scale > 1:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        drawn.append(image)
    pixels = to_pixels(drawn)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    pixels *= 1 - 0.12 * torch.rand((len(batch), 1, 1, 1), generator=generator)
    for image in pixels[: len(batch) // 4]:
        image += 0.03 * rng.random() * torch.randn(image.shape, generator=generator)
    return pixels.clamp_(0, 1)


def initialize_encoder(encoder: FastViTHD) -> None:
    """Start where a few hundred steps suffice: blocks that do something, mixers near identity."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in encoder.modules():
        if isinstance(module, Reparam):
            weight = module.reparam_conv.weight
            nn.init.normal_(weight, std=0.3 / weight.shape[-1])
            with torch.no_grad():
                weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] += 1
        for scale in ("layer_scale", "layer_scale_1", "layer_scale_2"):
            if hasattr(module, scale):
                nn.init.constant_(getattr(module, scale), 0.3)
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        # Backgrounds are nearly white and pixels are not normalized.
        if first.bias is not None:
            first.bias.copy_(-0.9 * first.weight.sum((1, 2, 3)))
    nn.init.normal_(encoder.head.proj, std=0.02)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then linear to zero."""
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def train_encoder(model: DemoModel, steps: int, batch: int, seed: int, device: str) -> None:
    encoder = model.encoder
    initialize_encoder(encoder)
    encoder.to(device).train()
    heads = nn.Linear(model.config["mm_hidden_size"], sum(HEADS.values())).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    size = model.config["vision_config"]["image_size"]
    rng = random.Random(seed)
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * schedule(step, steps, 50)
        chosen = [generate(rng.getrandbits(40), held_out=False) for _ in range(batch)]
        targets = torch.tensor([cell_targets(scene) for scene in chosen], device=device)
        pixels = images(chosen, rng, size).to(device)
        logits = heads(model.encode(pixels)).split(list(HEADS.values()), -1)
        loss = torch.zeros((), device=device)
        right = torch.ones(targets.shape[:2], dtype=torch.bool, device=device)
        for index, values in enumerate(logits):
            target = targets[..., index]
            # Most cells are empty: what little there is counts for more.
            weight = torch.where(targets[..., 0] > 0, 1.0, 0.25)
            loss = (
                loss
                + (F.cross_entropy(values.transpose(1, 2), target, reduction="none") * weight).sum()
                / weight.sum()
            )
            right &= values.argmax(-1) == target
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 25 == 24 or step == steps - 1:
            filled = right[targets[..., 0] > 0].float().mean()
            print(
                f"encoder {step + 1}/{steps}  loss {loss.item():.4f}"
                f"  cells {right.float().mean():.4f}  filled {filled:.4f}"
                f"  {time.monotonic() - start:.0f} s",
                flush=True,
            )
    encoder.eval()


@torch.no_grad()
def encode_pool(model: DemoModel, count: int, seed: int, device: str) -> tuple[list[Scene], Tensor]:
    """Scenes for the second phase and their features, float16 [count, N, C]."""
    rng = random.Random(seed)
    size = model.config["vision_config"]["image_size"]
    pool = [generate(rng.getrandbits(40), held_out=False) for _ in range(count)]
    features = [
        model.encode(images(pool[i : i + 64], rng, size).to(device)).half().cpu()
        for i in range(0, count, 64)
    ]
    return pool, torch.cat(features)


def choose(batch: list[Scene], rng: random.Random, describe: float) -> list[list[Question]]:
    """The questions of one step: about as long for each scene, so that little is padding.

    With probability `describe` each scene is described and asked one thing more; else it is
    asked up to five things.
    """
    describes = rng.random() < describe
    asked = []
    for scene in batch:
        long, *short = scene.questions(rng.getrandbits(32))
        rng.shuffle(short)
        asked.append([short[0], long] if describes else short[:5])
    return asked


def initialize_language(model: DemoModel) -> None:
    """Embeddings at a scale where, tied, the first logits are neither flat nor sharp."""
    hidden = model.config["hidden_size"]
    for name, parameter in model.language.named_parameters():
        if "embed" in name:
            nn.init.normal_(parameter, std=hidden**-0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def train_language(
    model: DemoModel,
    pool: list[Scene],
    features: Tensor,
    steps: int,
    batch: int,
    seed: int,
    device: str,
    out: Path,
) -> None:
    initialize_language(model)
    with torch.no_grad():
        # The projector starts where its input has a variance of one.
        next(model.projector.parameters()).div_(features[:512].float().square().mean().sqrt())
    model.to(device)
    model.language.train()
    matrices: list[Tensor] = []
    rest: list[Tensor] = list(model.projector.parameters())
    for name, parameter in model.language.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else rest).append(parameter)
    peaks = (PEAK_MATRICES, PEAK_REST)
    optimizers = (
        torch.optim.Muon(matrices, lr=peaks[0], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peaks[1], betas=(0.9, 0.98), weight_decay=0.01),
    )
    rng = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    tally: dict[tuple[str, int], list[int]] = {}
    start = time.monotonic()
    for step in range(steps):
        progress = step / steps
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, steps, 100)
            optimizer.zero_grad()
        bits = rng.choice((0, 0, 4, 4, 8)) if progress > 0.6 else 0
        rows = [rng.randrange(len(pool)) for _ in range(batch)]
        batch_scenes = [pool[row] for row in rows]
        asked = choose(batch_scenes, rng, 0.2 if progress < 0.3 else 0.5)
        seen = features[rows].float()
        seen *= 1 + 0.02 * torch.randn(seen.shape, generator=noise)
        questions = collate(model, asked, device)
        with rounded(model.language, bits, rng.choice((32, 64, 64, 64, 128))):
            loss, right = answer_loss(model, questions, seen.to(device))
            named = model.projector(seen.to(device)) @ model.language.embed_tokens.weight.T
            words = word_targets(model, batch_scenes).to(device)
            aligned = F.cross_entropy(named.flatten(0, 1), words.flatten(0, 1))
            (loss + (1 - progress) * aligned).backward()
        nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        wrong = torch.zeros(sum(map(len, asked)), device=device)
        wrong.index_add_(0, questions.question, (~right).float())
        flat = [question for some in asked for question in some]
        for question, misses in zip(flat, wrong.tolist(), strict=True):
            entry = tally.setdefault((question.kind, bits), [0, 0])
            entry[0] += not misses
            entry[1] += 1
        if step % 100 == 99 or step == steps - 1:
            shares = "  ".join(
                f"{kind}{f' {bits} bit' if bits else ''} {right / asked:.3f}"
                for (kind, bits), (right, asked) in sorted(tally.items(), key=lambda e: e[0][::-1])
            )
            tally.clear()
            print(
                f"answers {step + 1}/{steps}  loss {loss.item():.4f}"
                f"  words {aligned.item():.3f}  {shares}"
                f"  {time.monotonic() - start:.0f} s",
                flush=True,
            )
        if step % 500 == 499:
            model.save(out)
    model.language.eval()


def measure(model: DemoModel, count: int, device: str) -> dict[int, dict[str, Score]]:
    """Scores on held-out questions by bits (0: the 16 bits stored), greedy, float32."""
    pairs = held_out(count)
    size = model.config["vision_config"]["image_size"]
    with torch.no_grad():
        features = torch.cat(
            [
                model.encode(to_pixels([s.draw(size) for s, _ in pairs[i : i + 50]]).to(device))
                for i in range(0, count, 50)
            ]
        )
    scores = {}
    for bits in (0, 8, 4):
        with rounded(model.language, bits):
            scores[bits] = score(pairs, model.answer(features, [q.prompt for _, q in pairs]))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pool", type=int, default=12_000, help="scenes to ask about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--encoder", type=Path, help="trained encoder: read if it is there, else written"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = demo_tokenizer.train()
    model = DemoModel(make_config(tokenizer), tokenizer)
    if options.encoder and options.encoder.is_file():
        model.encoder.load_state_dict(torch.load(options.encoder, weights_only=True))
        model.encoder.to(device).eval()
    else:
        train_encoder(model, options.encoder_steps, 32, options.seed, device)
        if options.encoder:
            torch.save(model.encoder.state_dict(), options.encoder)
    start = time.monotonic()
    pool, features = encode_pool(model, options.pool, options.seed + 1, device)
    print(f"pool of {len(pool)} scenes encoded in {time.monotonic() - start:.0f} s", flush=True)
    torch.manual_seed(options.seed)
    train_language(model, pool, features, options.steps, 16, options.seed + 2, device, options.out)
    model.save(options.out)
    for bits, scores in measure(DemoModel.load(options.out), 1000, "cpu").items():
        shares = "  ".join(f"{kind} {entry.share:.3f}" for kind, entry in scores.items())
        print(f"held out, {f'{bits} bits' if bits else '16 bits'}: {shares}")


if __name__ == "__main__":
    main()
