"""`losa bench serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from losa_export.commands.arguments import EXIT_INTERRUPTED, counts, duration

_LIMITS = ("ttft", "tpot", "e2el")


def serve_parser() -> argparse.ArgumentParser:
    """`losa bench serve`: apart from `losa bench`, whose first argument is a folder."""
    parser = argparse.ArgumentParser(
        prog="losa bench serve",
        description="Load an OpenAI-compatible server at several request rates and concurrencies.",
    )
    add = parser.add_argument
    add("--url", required=True, metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    add(
        "--endpoint",
        choices=("/v1/completions", "/v1/chat/completions"),
        default="/v1/completions",
        help="default: %(default)s",
    )
    add("--model", default=None, metavar="NAME", help="in the requests (default: the first one the server lists)")
    add("--api-key-env", default=None, metavar="VAR", help="environment variable that holds the server's key")
    add("--num-prompts", type=int, default=100, metavar="N", help="requests of each load (default: %(default)s)")
    add(
        "--request-rate",
        type=_numbers,
        default=(float("inf"),),
        metavar="R[,R…]",
        help="requests per second; inf sends all at once (default: inf)",
    )
    add(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="of arrivals: 1 is a Poisson process, less is burstier, more is evener (default: 1)",
    )
    add(
        "--max-concurrency",
        type=counts,
        default=[None],
        metavar="N[,N…]",
        help="requests under way at most, at each rate (default: no limit)",
    )
    add("--input-len", type=int, default=128, metavar="N", help="tokens of a random prompt (default: %(default)s)")
    add("--output-len", type=int, default=128, metavar="N", help="tokens asked for (default: %(default)s)")
    add("--prefix-len", type=int, default=0, metavar="N", help="tokens that all random prompts begin with, besides")
    add(
        "--prompts",
        type=Path,
        default=None,
        metavar="FILE.jsonl",
        help="rows with 'prompt' or 'messages' (default: random prompts)",
    )
    add(
        "--tokenizer",
        type=Path,
        default=None,
        metavar="DIR",
        help="with the model's tokenizer.json, which counts random prompts' tokens (default: words stand for tokens)",
    )
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="answers of full length, whatever the model says (default: for random prompts)",
    )
    add(
        "--continuous-usage",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for the count of tokens in each chunk (default: yes)",
    )
    add(
        "--goodput",
        nargs="+",
        default=None,
        metavar="NAME:MS",
        help="count the requests that keep all of these: ttft:MS tpot:MS e2el:MS",
    )
    add(
        "--percentiles",
        "--metric-percentiles",
        type=_numbers,
        default=(50.0, 90.0, 95.0, 99.0),
        metavar="P[,P…]",
        help="of latencies (default: 50,90,95,99)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: %(default)s)")
    add("--warmup", type=int, default=1, metavar="N", help="untimed requests before each load (default: %(default)s)")
    add("--timeout", type=duration, default=600.0, metavar="TIME", help="of a request (default: 10m)")
    add(
        "--json",
        type=Path,
        default=Path("serve-bench.json"),
        metavar="FILE",
        help="every request's timestamps (default: %(default)s)",
    )
    add("--markdown", type=Path, default=None, metavar="FILE", help="the tables")
    parser.set_defaults(command=_bench_serve)
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers such as 0.5,2,inf; their range is the config's business, which names the field."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' are no numbers; write for example 0.5,2") from None


def _bench_serve(arguments: argparse.Namespace) -> int:
    from losa_export.eval.serve_bench import ServeBenchConfig, bench_serve
    from losa_export.eval.serve_metrics import Objective
    from losa_export.eval.serve_report import print_serve_bench, serve_markdown
    from losa_export.files import check_output_file, write_text_atomic

    limits = None if arguments.goodput is None else _limits(arguments.goodput)
    config = ServeBenchConfig(
        url=arguments.url,
        endpoint=arguments.endpoint,
        model=arguments.model,
        num_prompts=arguments.num_prompts,
        request_rates=arguments.request_rate,
        burstiness=arguments.burstiness,
        max_concurrencies=tuple(arguments.max_concurrency),
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        prefix_len=arguments.prefix_len,
        prompts=arguments.prompts,
        tokenizer=arguments.tokenizer,
        ignore_eos=arguments.ignore_eos,
        continuous_usage=arguments.continuous_usage,
        objective=None if limits is None else Objective(**{f"{name}_ms": limit for name, limit in limits.items()}),
        percentiles=arguments.percentiles,
        seed=arguments.seed,
        warmup=arguments.warmup,
        timeout_s=arguments.timeout,
    )
    for path in (arguments.json, arguments.markdown):
        if path is not None:
            check_output_file(path)
    report = bench_serve(config, api_key=_api_key(arguments.api_key_env))
    report.write(arguments.json)
    document = report.as_dict()
    if arguments.markdown is not None:
        write_text_atomic(arguments.markdown, serve_markdown(document))
    print_serve_bench(document)
    if report.interrupted:
        print("losa: interrupted; what was measured by then is kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _limits(words: list[str]) -> dict[str, float]:
    """Limits in milliseconds by name. Raises: ConfigError for what is no NAME:MS, or a name twice."""
    from losa_export.errors import ConfigError

    limits: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = 0.0
        if name not in _LIMITS or name in limits or not limit > 0:
            raise ConfigError(
                f"goodput holds {word!r}; write each of {', '.join(_LIMITS)} at most once, with milliseconds above 0, "
                "such as ttft:500 tpot:50",
                field="goodput",
            )
        limits[name] = limit
    return limits


def _api_key(variable: str | None) -> str | None:
    """The key in an environment variable. Raises: ConfigError if it is not set."""
    from losa_export.errors import ConfigError

    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the variable {variable} holds no key of visible ASCII characters; set it", field="api_key_env"
        )
    return key
