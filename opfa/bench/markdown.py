"""What `opfa bench train` found, as Markdown, and how it gets into a README without being typed."""

from pathlib import Path
from typing import Any

from opfa.errors import RunError
from opfa.storage.files import check_file, write_text


def training_markdown(result: dict[str, Any]) -> str:
    """What `opfa bench train` found, as Markdown."""
    machine = result["machine"]
    places = ", ".join(machine["accelerators"]) or machine["processor"]
    lines = [
        f"{result['batch']} x {result['sequence_tokens']} tokens in {result['precision']}, "
        f"{places}, {result['threads']} threads; {result['steps']} steps each:",
        "",
        "| step | seconds, the fastest | median | slowest | peak memory, GB | of it libraries |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["variants"].items():
        seconds = " | ".join(f"{row[key]:.3g}" for key in ("seconds", "median", "slowest"))
        memory = " | ".join(f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "library_bytes"))
        lines.append(f"| {name} | {seconds} | {memory} |")
    lines += ["", "| ratio; times are of the fastest steps | |", "|---|---:|"]
    lines += [f"| {name} | {ratio:.2f} |" for name, ratio in result["ratios"].items()]
    rate = result["matrix_flops_per_second"]
    products = result["flops_per_step"] / rate / result["variants"]["plain"]["seconds"]
    lines += [
        f"| matrix products of ours alone / plain, time | {products:.2f} |",
        f"| share of this machine's matrix products, {rate / 1e9:,.0f} GFLOP/s | "
        f"{result['share_of_matrix_rate']:.0%} |",
    ]
    speed = result["tokens_per_second"]
    loader = f"{result['loader_tokens_per_second'] / speed:,.0f}"
    lines += [f"| speed of the loader alone / of training | {loader} |"]
    if result["mask_update_share"] is not None:
        share = f"{result['mask_update_share']:.3%}"
        lines += [f"| mask update / time between two of them | {share} |"]
    lines += [
        "",
        f"{speed:,.0f} real tokens per second in the fastest step. By part, measured apart:",
        "",
    ]
    lines += ["| part | seconds | share |", "|---|---:|---:|"]
    parts = result["seconds_by_part"]
    for part, seconds in parts.items():
        lines.append(f"| {part} | {seconds:.3g} | {seconds / sum(parts.values()):.0%} |")
    loss = f"{result['loss_bytes'] / 1e6:,.0f}"
    lines += ["", f"Memory of the loss for 8 x 512 tokens and 30,522 entries: {loss} MB."]
    return "\n".join(lines)


def check_between(file: Path, mark: str) -> None:
    """Raise `RunError` unless `write_between` can write there."""
    check_file(file)
    _around(file, mark)


def write_between(file: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->`; raises `RunError` where
    they don't stand.
    """
    before, after = _around(file, mark)
    write_text(file, f"{before}{text}\n{after}")


def _around(file: Path, mark: str) -> tuple[str, str]:
    """What stands before and after, with the marks."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    try:
        whole = file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: is not a text: {error}") from error
    before, found, rest = whole.partition(start)
    _, has_end, after = rest.partition(end)
    if not found or not has_end:
        raise RunError(f"{file}: has no {start.strip()} with {end} after it")
    return before + found, has_end + after
