"""Make the model and the data of `onecard demo`: python examples/make_demo_base.py [--steps N] [--output DIR]

The task of the demo is one that shops have: a customer's message in, the order as JSON out. A base that small must
be taught English first, so this script writes a little world (people, goods, cities, days), trains a byte-level
BPE tokenizer and pretrains a Llama of 3.2 million parameters on prose, questions about messages, and records of
other kinds as JSON. The base so learns to read messages and to write JSON, but never sees an order as JSON: that
is what the fine-tuning adds. Answers count ten times as much as the text they are about: most of that text is
chance, which no model can learn, while every answer can be found by reading. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIRST = """Ada Alma Amir Anya Basil Bela Bruno Carla Cleo Dario Dora Edgar Elin Emil Esra Fiona Flora Gita Hana Hugo
Ida Igor Ines Iris Ivan Jana Jonas Juno Karim Kira Lars Lena Leo Lina Luca Mara Marco Maya Mila Nadia""".split()
LAST = """Adler Baker Bergman Blum Brandt Carver Castro Conti Cruz Dahl Duarte Engel Falk Ferrari Fischer Fuchs Garcia
Grant Haas Hansen Hart Holm Ivanov Jansen Keller Klein Kovacs Lang Lehmann Lopez Marin Meyer Moreau Nagy""".split()
GOODS = {
    "mug": "mugs", "bowl": "bowls", "plate": "plates", "teapot": "teapots", "vase": "vases", "lamp": "lamps",
    "basket": "baskets", "pillow": "pillows", "towel": "towels", "blanket": "blankets", "candle": "candles",
    "notebook": "notebooks", "pencil": "pencils", "apron": "aprons", "tray": "trays", "jar": "jars",
}  # fmt: skip
COLORS = "red blue green white black yellow gray brown pink orange".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CITIES = "Oslo Bern Riga Porto Lyon Graz Turin Malmo Ghent Bonn Split Cork Leeds Basel Nice Delft".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
WEATHER = "sunny rainy windy cloudy foggy snowy".split()
GREETINGS = ["Hi,", "Hello,", "Good morning,", "Dear team,", "Hey there,", "Good evening,"]
MESSAGES = [
    "{hi} this is {name}. Please send {item} to {city} by {day}.",
    "{hi} could you ship {item} to {city}? I need it on {day}. Thanks, {name}",
    "{hi} I would like {item}. Deliver to {city} on {day}, please. {name}",
    "{hi} my name is {name} and I want to order {item} for {day}. I live in {city}.",
    "{hi} {name} here. Can I get {item} in {city} before {day}?",
    "{hi} we are out of stock in {city}, so please bring {item} on {day}. Regards, {name}",
    "{hi} for my shop in {city} I need {item}. {day} would be fine. Best, {name}",
    "Order from {name}: {item}, to {city}, on {day}.",
    "{hi} it is {name} again. {day} is my party in {city} and I still need {item}!",
    "{hi} {item}, please. To {name} in {city}, no later than {day}.",
    "On {day} I will be in {city}. Could {item} be there? Yours, {name}",
    "{hi} please put {item} on my account. {city}, {day}. Thank you! {name}",
]


def person(rng: Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def make_order(rng: Random) -> dict:
    """What a customer wants, in the form that the demo's task asks for."""
    return {
        "customer": person(rng),
        "quantity": rng.randint(1, 12),
        "color": rng.choice(COLORS),
        "product": rng.choice(sorted(GOODS)),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }


def message(order: dict, rng: Random) -> str:
    """The order as the customer writes it: "three blue mugs", "12 jars" never without a colour, "a red vase"."""
    n = order["quantity"]
    noun = order["product"] if n == 1 else GOODS[order["product"]]
    count = rng.choice([NUMBERS[n - 1], NUMBERS[n - 1], str(n)]) if n > 1 else rng.choice(["one", "a"])
    text = rng.choice(MESSAGES).format(
        hi=rng.choice(GREETINGS),
        name=order["customer"],
        item=f"{count} {order['color']} {noun}",
        city=order["city"],
        day=order["day"],
    )
    return text[0].upper() + text[1:]


def compact(record: object) -> str:
    return json.dumps(record, separators=(",", ":"))


def chat(*turns: str) -> str:
    """A chat as the template writes it."""
    roles = ("user", "assistant")
    return "<|bos|>" + "".join(f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns))


def sentence(rng: Random) -> str:
    name, n, item = person(rng), rng.randint(2, 12), rng.choice(sorted(GOODS))
    return rng.choice([
        f"{name} lives in {rng.choice(CITIES)} and works every {rng.choice(DAYS)}.",
        f"On {rng.choice(DAYS)} it was {rng.choice(WEATHER)} in {rng.choice(CITIES)}.",
        f"{name} bought {NUMBERS[n - 1]} {rng.choice(COLORS)} {GOODS[item]} and gave them to {person(rng)}.",
        f"{NUMBERS[n - 1]} is written {n}, and {n} is read {NUMBERS[n - 1]}.",
        f"One {item}, many {GOODS[item]}. Many {GOODS[item]}, one {item}.",
        f"Remember {name}. Who was it? It was {name}.",
    ])  # fmt: skip


def record(rng: Random) -> str:
    """JSON of kinds that are not orders: two or three facts in a sentence, the same as a record."""
    n = rng.randint(1, 12)
    facts = {
        "person": person(rng), "place": rng.choice(CITIES), "when": rng.choice(DAYS), "sky": rng.choice(WEATHER),
        "paint": rng.choice(COLORS), "thing": rng.choice(sorted(GOODS)), "count": n,
    }  # fmt: skip
    keys = rng.sample(sorted(facts), rng.randint(2, 3))
    spoken = [NUMBERS[n - 1] if key == "count" else str(facts[key]) for key in keys]
    order = rng.sample(range(len(keys)), len(keys))
    return chat("As JSON: " + ", ".join(spoken[i] for i in order), compact({key: facts[key] for key in keys}))


def questions(rng: Random) -> str:
    """A customer's message and three questions about it, answered in words."""
    order = make_order(rng)
    pairs = [
        ("Who wrote?", order["customer"]),
        ("Which city?", order["city"]),
        ("Which day?", order["day"]),
        ("How many, in digits?", str(order["quantity"])),
        ("What color?", order["color"]),
        ("What is it, one of them?", order["product"]),
        ("Color and thing?", f"{order['color']} {order['product']}"),
        ("Name, city, day?", f"{order['customer']}, {order['city']}, {order['day']}"),
    ]
    (first, answer), *rest = rng.sample(pairs, 3)
    return chat(f"{message(order, rng)}\n{first}", answer, *(part for pair in rest for part in pair))


def documents(seed: int) -> Iterator[str]:
    """The base's reading matter, without end."""
    rng = Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.08:
            yield "<|bos|>" + " ".join(sentence(rng) for _ in range(3)) + "<|im_end|>\n"
        else:
            yield record(rng) if kind < 0.30 else questions(rng)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(seed: int, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text goes in and comes out again.

    Words, numbers and what stands between them are split first: a word is the same token after a space and after
    a quote, so that to copy it is to repeat it.
    """
    tokenizer = Tokenizer(models.BPE())
    kinds = Split(Regex("[A-Za-z]+|[0-9]+|[^A-Za-z0-9]+"), behavior="isolated")
    tokenizer.pre_tokenizer = Sequence([kinds, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    text = documents(seed)
    tokenizer.train_from_iterator((next(text) for _ in range(20_000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose every linear layer reads a multiple of 64 values, NF4's block."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.04,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    start_to_look_back(model)
    return model


def start_to_look_back(model: LlamaForCausalLM) -> None:
    """Let attention begin near W_q^T W_k = I and W_o W_v = I: to look at tokens like itself and to pass them on.

    Reading and copying then need not be found by chance (mimetic initialization, arXiv 2305.09828, section 3).
    """
    width = model.config.hidden_size
    for layer in model.model.layers:
        attention = layer.self_attn
        look, carry = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
        with torch.no_grad():
            attention.q_proj.weight.copy_(0.7 * look)
            attention.k_proj.weight.copy_(0.7 * look)
            attention.v_proj.weight.copy_(carry)
            attention.o_proj.weight.copy_(model.config.initializer_range * carry.T)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, pool: int = 16) -> Iterator[tuple]:
    """int64 (rows, longest) of documents of about one length, padded, and each token's weight in the loss."""
    text, rng = documents(seed), Random(seed)
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    assistant = tokenizer("assistant", add_special_tokens=False)["input_ids"][0]
    while True:
        pieces = tokenizer([next(text) for _ in range(rows * pool)], add_special_tokens=False)["input_ids"]
        pieces.sort(key=len)
        groups = [pieces[i : i + rows] for i in range(0, len(pieces), rows)]
        rng.shuffle(groups)
        for group in groups:
            width = math.ceil(max(map(len, group)) / 16) * 16
            ids = torch.full((rows, width), tokenizer.pad_token_id)
            weights = torch.zeros(rows, width)
            for row, piece in enumerate(group):
                ids[row, : len(piece)] = torch.tensor(piece)
                inside = False
                for i, token in enumerate(piece):
                    weights[row, i] = 1.0 if inside else 0.1
                    inside = (inside and token != end) or (token == assistant and i > 0 and piece[i - 1] == start)
            yield ids, weights


def pretrain(model: LlamaForCausalLM, data: Iterator[tuple], steps: int, peak: float = 2e-3) -> None:
    """Weighted next-token prediction, a short warm-up, a cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    begin, fast = time.time(), bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    for step in range(steps):
        rate = peak * min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        ids, weights = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = model(input_ids=ids).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            answers = losses[weights == 1].mean().item()
            print(
                f"step {step:5d}  answers {answers:.3f}  text {losses[weights > 0].mean().item():.3f}"
                f"  {tuple(ids.shape)}  {time.time() - begin:5.0f} s",
                flush=True,
            )


def task_rows(count: int, seed: int, taken: set[str]) -> list[dict]:
    """Examples of the task, one a customer, none of a customer in `taken`."""
    rng, rows, seen = Random(seed), [], set(taken)
    while len(rows) < count:
        order = make_order(rng)
        if order["customer"] in seen:
            continue
        seen.add(order["customer"])
        asked, answer = {"role": "user", "content": message(order, rng)}, compact(order)
        rows.append({"messages": [asked, {"role": "assistant", "content": answer}]})
    return rows


def write_data(folder: Path, seed: int) -> None:
    """heldout.jsonl, and train.jsonl without any of its customers."""
    heldout = task_rows(128, seed + 1, set())
    names = {json.loads(row["messages"][1]["content"])["customer"] for row in heldout}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", task_rows(1000, seed + 2, names)), ("heldout", heldout)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "onecard" / "demo")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    write_data(args.output / "data", args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, batches(tokenizer, args.seed, rows=64), args.steps)
    model.to(torch.bfloat16).save_pretrained(args.output / "base")
    tokenizer.save_pretrained(args.output / "base")


if __name__ == "__main__":
    main()
