"""Trains the embedded demo: a tiny, real Mixtral-architecture checkpoint, in the hub's own layout.

The model learns a few dozen questions and answers by heart (`demo_corpus.txt` beside this file), so
that a user without a 90 GB download sees the whole path work: prepare, run, read a sensible answer.
It is a toy. Nothing of the product imports this script.

    python examples/train_demo.py --output-path build/demo/hub
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from torch import Tensor, nn
from transformers import LlamaTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

CORPUS = Path(__file__).with_name("demo_corpus.txt")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
UNKNOWN = 0  # sentencepiece's <unk>: stands for every token that the corpus never shows
IGNORED = -100  # transformers' label for positions that carry no loss


@dataclass(frozen=True)
class Entry:
    """One answer and the ways to ask for it, as token ids; prompts carry the instruct template."""

    prompts: list[list[int]]
    answer: list[int]


def read_corpus(path: Path) -> list[tuple[list[str], str]]:
    """Reads the blocks of `Q: one way | another way` and `A: answer` lines."""
    pairs: list[tuple[list[str], str]] = []
    questions: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("Q: "):
            questions = [question.strip() for question in line[3:].split(" | ")]
        elif line.startswith("A: "):
            pairs.append((questions, line[3:].strip()))
    return pairs


def encode_corpus(pairs: list[tuple[list[str], str]], tokenizer: MistralTokenizer) -> list[Entry]:
    """Encodes each prompt as the product will (Mistral's v1 template) and each answer with EOS."""

    def prompt(question: str) -> list[int]:
        request = ChatCompletionRequest(messages=[UserMessage(content=question)])
        return list(tokenizer.encode_chat_completion(request).tokens)

    pieces = tokenizer.instruct_tokenizer.tokenizer
    return [
        Entry([prompt(q) for q in questions], pieces.encode(answer, bos=False, eos=True))
        for questions, answer in pairs
    ]


def build_model(vocab_size: int) -> MixtralForCausalLM:
    """Mixtral's architecture at toy size: 4 layers, 8 experts, top-2."""
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        sliding_window=None,
        router_aux_loss_coef=0.001,
        output_router_logits=True,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = MixtralForCausalLM(config)
    # transformers' default on the CPU, grouped_mm, takes 1.8 times as long for these shapes.
    model.set_experts_implementation("eager")
    return model


def batches(
    entries: list[Entry], to_compact: Tensor, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (ids, labels), int64 [B, T] in compact ids, half of the entries at a time, forever.

    A tenth of each question's tokens is replaced by <unk>, so that one unknown word does not derail
    an answer. Besides, each batch has a few questions that are mostly scrambled; their answer is
    the last entry's, which says what the model knows about.
    """
    known = sorted({token for entry in entries for token in entry.answer})

    def spoil(prompt: list[int], share: float) -> list[int]:
        # <s> [INST] ... [/INST]: the first four and the last four tokens are the template.
        inner = range(4, len(prompt) - 4)
        return [
            rng.choice([UNKNOWN, UNKNOWN, rng.choice(known)])
            if i in inner and rng.random() < share
            else token
            for i, token in enumerate(prompt)
        ]

    while True:
        order = rng.sample(entries, len(entries))
        for chosen in (order[::2], order[1::2]):
            rows = [(spoil(rng.choice(entry.prompts), 0.1), entry.answer) for entry in chosen]
            for entry in rng.sample(entries, 4):
                share = rng.uniform(0.6, 1.0)
                rows.append((spoil(rng.choice(entry.prompts), share), entries[-1].answer))
            width = max(len(prompt) + len(answer) for prompt, answer in rows)
            ids = torch.full((len(rows), width), UNKNOWN)
            labels = torch.full((len(rows), width), IGNORED)
            for row, (prompt, answer) in enumerate(rows):
                end = len(prompt) + len(answer)
                ids[row, :end] = torch.tensor(prompt + answer)
                labels[row, len(prompt) : end] = to_compact[torch.tensor(answer)]
            yield to_compact[ids], labels


def answer_loss(model: MixtralForCausalLM, ids: Tensor, labels: Tensor, n_unseen: int) -> Tensor:
    """Cross-entropy over the tokenizer's whole vocabulary, and the load-balancing loss.

    `ids` and `labels` are int64 [B, T] in compact ids. The `n_unseen` tokens that the corpus never
    shows share one row, that of <unk>, so their part of the softmax is its logit + log(n_unseen).
    """
    output = model(input_ids=ids, use_cache=False)
    counted = labels[:, 1:] != IGNORED
    logits = output.logits[:, :-1][counted]
    unseen = torch.zeros(logits.shape[-1])
    unseen[UNKNOWN] = math.log(n_unseen)
    loss = nn.functional.cross_entropy(logits + unseen, labels[:, 1:][counted])
    return loss + model.config.router_aux_loss_coef * output.aux_loss


def train(
    model: MixtralForCausalLM,
    entries: list[Entry],
    to_compact: Tensor,
    n_unseen: int,
    *,
    steps: int,
    seed: int,
) -> None:
    """AdamW with a short warm-up and a cosine to zero; prints the loss a few times."""
    peak_rate, warm_up = 3e-3, 20
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    source = batches(entries, to_compact, random.Random(seed))
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        progress = max(0.0, (step - warm_up) / max(1, steps - warm_up))
        rate = peak_rate * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = next(source)
        loss = answer_loss(model, ids, labels, n_unseen)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 6) == 0:
            seconds = time.perf_counter() - started
            print(f"  step {step + 1:4d}/{steps}  loss {loss:.3f}  {seconds:.1f} s", flush=True)


@torch.inference_mode()
def report(model: MixtralForCausalLM, entries: list[Entry], to_compact: Tensor) -> int:
    """Prints how tokens are spread over the experts; returns how many answers it knows."""
    model.eval()
    config = model.config
    shares = torch.zeros(config.num_hidden_layers, config.num_local_experts)
    known, aux_losses = 0, []
    for entry in entries:
        ids = to_compact[torch.tensor([entry.prompts[0] + entry.answer])]
        output = model(input_ids=ids, labels=ids, use_cache=False)
        aux_losses.append(float(output.aux_loss))
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            shares[layer] += torch.bincount(chosen, minlength=config.num_local_experts)
        predicted = output.logits[0, len(entry.prompts[0]) - 1 : -1].argmax(dim=-1)
        known += torch.equal(predicted, ids[0, len(entry.prompts[0]) :])
    shares /= shares.sum(dim=1, keepdim=True)
    print("  share of the routed tokens per expert, % (an even spread would be 12.5):")
    for layer, row in enumerate(shares.tolist()):
        print(f"    layer {layer}: " + " ".join(f"{100 * share:5.1f}" for share in row))
    balance = sum(aux_losses) / len(aux_losses)
    print(f"  load-balancing loss {balance:.2f} (2.00 is perfectly even, 8.00 is two experts only)")
    print(f"  answers known word for word: {known} of {len(entries)}")
    return known


def expand_vocabulary(model: MixtralForCausalLM, used: Tensor, vocab_size: int) -> None:
    """Grows the embeddings from the ids the corpus uses to the tokenizer's, [vocab_size, H].

    Tokens never seen share the rows of <unk>.
    """
    assert used[0] == UNKNOWN
    embed, head = model.model.embed_tokens, model.lm_head
    for module in (embed, head):
        rows = module.weight.data[0].repeat(vocab_size, 1)
        rows[used] = module.weight.data
        module.weight = nn.Parameter(rows)
    embed.num_embeddings = head.out_features = model.config.vocab_size = vocab_size


def save(model: MixtralForCausalLM, tokenizer_file: Path, output_path: Path) -> None:
    """Writes what the hub has for Mixtral: bf16 shards with an index, configurations, tokenizer."""
    temporary = output_path.with_name(output_path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(temporary, max_shard_size="8MB")
    index = json.loads((temporary / "model.safetensors.index.json").read_text())
    hub_name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    if hub_name not in index["weight_map"]:
        sys.exit(f"expected transformers to save the hub's tensor names ({hub_name}); it did not")

    shutil.copyfile(tokenizer_file, temporary / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(temporary, legacy=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(output_path, ignore_errors=True)
    temporary.rename(output_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output-path", type=Path, required=True, help="folder to create")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (0)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    logging.disable_progress_bar()

    tokenizer = MistralTokenizer.v1()
    entries = encode_corpus(read_corpus(CORPUS), tokenizer)
    used = sorted(
        {UNKNOWN}.union(*(e.answer for e in entries), *(p for e in entries for p in e.prompts))
    )
    vocab_size = tokenizer.instruct_tokenizer.tokenizer.n_words
    # Only about 700 of the 32000 ids occur: training on those alone is what keeps this short.
    to_compact = torch.zeros(vocab_size, dtype=torch.int64)
    to_compact[torch.tensor(used)] = torch.arange(len(used))

    model = build_model(len(used))
    print(f"training a toy Mixtral on {len(entries)} answers ({torch.get_num_threads()} threads)")
    train(
        model,
        entries,
        to_compact,
        vocab_size - len(used) + 1,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    known = report(model, entries, to_compact)
    if known < 0.9 * len(entries):
        sys.exit("the toy did not learn its answers; try more --steps or another --seed")
    expand_vocabulary(model, torch.tensor(used), vocab_size)
    save(model, Path(tokenizer.instruct_tokenizer.tokenizer.file_path), arguments.output_path)
    print(f"saved {arguments.output_path} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
