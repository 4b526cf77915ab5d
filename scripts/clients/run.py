"""Every client of docs/clients.md, in a version that is pinned here, against a server that this starts.

    python -m scripts.clients.run [--only NAME ...] [--work FOLDER] [--out bench/results/clients.json]

Each kind of client gets an environment of its own below `--work` (a temporary folder if not given; one that is there is
used again), by pip and npm: this needs their registries, and a GB or more for some. What a script tried comes back as
lines of JSON. vLLM's `bench serve` comes from vLLM's own wheel without what that needs for GPUs (`vllm_bench.txt`):
torch, transformers and the like are those of the environment that this runs in. The servers have the bundled model on
two ranks; one, for agents, has room for long prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kit.bound import Bound, run
from tests.kit.served import ROOT, TOOL_TEMPLATE, server, shaped_model, write_result
from train.problems import held_out

from elastic_ep.run import BUNDLED_MODEL

HERE = Path(__file__).parent
KEY = "secret"
INSTALL_S = 1800.0
CLIENT_S = 600.0
LONG = 65536
TEMPLATE = ["--chat-template", str(TOOL_TEMPLATE), "--tool-call-parser", "hermes"]
NODE = (
    "openai@6.49.0", "ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7",
    "opencode-ai@1.18.33", "@openai/codex@0.171.0",
)  # fmt: skip
QUESTIONS = 20


@dataclass(frozen=True)
class Client:
    """`needs`: what pip installs; the first names the version that is told. `script`: in this folder."""

    needs: tuple[str, ...]
    script: str


SCRIPTS = {
    "openai-python": Client(("openai==3.57.0",), "openai_python.py"),
    "litellm": Client(("litellm==1.110.2",), "litellm_client.py"),
    "instructor": Client(("instructor==1.17.0", "anthropic==2.14.0"), "instructor_client.py"),
    "anthropic": Client(("anthropic==2.14.0",), "anthropic_client.py"),
    "openai-agents": Client(("openai-agents==0.24.0",), "openai_agents.py"),
    "langchain-openai": Client(("langchain-openai==1.7.4",), "langchain_client.py"),
    "pydantic-ai": Client(
        ("pydantic-ai-slim[openai,anthropic]==2.68.0", "anthropic==2.14.0"), "pydantic_ai_client.py"
    ),
}
TOOLS = {"lm-eval": "lm-eval[api]==0.4.13", "guidellm": "guidellm==0.8.1", "aiperf": "aiperf==0.13.0"}
"""Programs with a command line of their own."""
AGENTS = ("codex", "opencode")
SGLANG = "sglang==0.5.23"
"""Without what it needs: its kits need no more than requests and openai."""
VLLM = HERE / "vllm_bench.txt"
VLLM_RUNS = {
    "/v1/completions, random prompts": ("vllm", "/v1/completions", "--dataset-name random --ignore-eos"),
    "/v1/chat/completions, random prompts": (
        "openai-chat", "/v1/chat/completions", "--dataset-name random --temperature 0 --num-warmups 2",
    ),
    "/v1/completions, repeated prefixes, eight a second": (
        "openai", "/v1/completions",
        "--dataset-name prefix_repetition --prefix-repetition-prefix-len 64 --prefix-repetition-suffix-len 16"
        " --prefix-repetition-num-prefixes 4 --prefix-repetition-output-len 16"
        " --request-rate 8 --logprobs 1 --goodput e2el:60000",
    ),
    "/v1/chat/completions, held-out questions, faster and faster": (
        "openai-chat", "/v1/chat/completions",
        "--dataset-name custom --dataset-path {questions} --custom-output-len 64 --skip-chat-template"
        " --ramp-up-strategy linear --ramp-up-start-rps 2 --ramp-up-end-rps 8",
    ),
}  # fmt: skip
"""What `vllm bench serve` is told: kind of server, endpoint, and the rest."""
ALL = (*SCRIPTS, "node", *TOOLS, *AGENTS, "sglang", "vllm")


@dataclass(frozen=True)
class Place:
    """Where clients are installed and run, and which servers they ask."""

    work: Path
    url: str
    scripted: str
    long: str
    suite: str
    """Without a key."""

    @property
    def variables(self) -> dict[str, str]:
        """No registry of models is asked."""
        return {
            **os.environ, "SERVER_URL": self.url, "SUITE_URL": self.suite,
            "SCRIPTED_URL": self.scripted, "OPENAI_API_KEY": KEY, "OURS_KEY": KEY,
            "HF_HUB_OFFLINE": "1", "HOME": str(self.work / "home"), "CODEX_HOME": str(self.work / "codex"),
        }  # fmt: skip

    def environment(
        self, name: str, needs: Sequence[str], alone: Sequence[str] = (), *, shares: bool = False
    ) -> Path:
        """`bin` of a virtual environment with these packages; those in `alone` without theirs.

        `shares`: beside them it sees those of this environment.
        """
        folder = self.work / name
        if not (folder / "made").exists():
            subprocess.run(
                [sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=INSTALL_S
            )
            pip = [str(folder / "bin" / "pip"), "install", "--quiet", *needs]
            if shares:
                theirs = next(folder.glob("lib/python*/site-packages"))
                (theirs / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
            if needs:
                subprocess.run(pip, check=True, timeout=INSTALL_S)
            if alone:
                subprocess.run([*pip[:3], "--no-deps", *alone], check=True, timeout=INSTALL_S)
            (folder / "made").touch()
        return folder / "bin"

    def node(self) -> Path:
        folder = self.work / "node"
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            npm = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *NODE]
            subprocess.run(npm, check=True, timeout=INSTALL_S, cwd=folder)
            (folder / "made").touch()
        return folder

    def told(self, command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        apart = ["env", "-u", "PYTHONPATH", "-u", "VIRTUAL_ENV", *command]
        return run(
            apart, CLIENT_S, env={**self.variables, "PWD": str(cwd)}, cwd=cwd, stdin=subprocess.DEVNULL
        )


Told = list[dict[str, Any]]


def one(client: str, version: str, what: str, passed: bool, detail: str) -> Told:
    result = "passed" if passed else "failed"
    return [{"client": client, "version": version, "tried": what, "result": result, "detail": detail[-1500:]}]


def script(place: Place, name: str) -> Told:
    client = SCRIPTS[name]
    python = place.environment(name, client.needs) / "python"
    done = place.told([str(python), str(HERE / client.script)], HERE)
    return lines(done, name, client.needs[0].split("==")[1])


def lines(done: subprocess.CompletedProcess[str], name: str, version: str) -> Told:
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    return [{"version": version, **told} for told in found] or one(
        name, version, "anything", False, done.stderr
    )


def node(place: Place) -> Told:
    folder = place.node()
    shutil.copy(HERE / "node_clients.mjs", folder)
    told = lines(place.told(["node", "node_clients.mjs"], folder), "openai-node", "")
    versions = {"openai-node": NODE[0], "AI SDK": NODE[1]}
    return [{**line, "version": versions[line["client"]].rsplit("@", 1)[1]} for line in told]


def lm_eval(place: Place) -> Told:
    """Generation, by both endpoints, and log-likelihoods: the bundled model knows all answers."""
    folder = place.work / "tasks"
    folder.mkdir(exist_ok=True)
    _lm_eval_tasks(folder)
    chat, text = "local-chat-completions", "local-completions"
    template = ["--apply_chat_template"]
    remote = f"tokenizer_backend=remote,auth_token={KEY}"
    plain = "tokenizer_backend=None"
    found: Told = []
    for kind, task, metric, tokenizer, more, least in (
        (chat, "held_out", "exact_match,last-number", plain, template, 0.95),
        # Without its template the model does not know a question for one.
        (text, "held_out", "exact_match,last-number", plain, [], 0.0),
        # Its task has the template: lm-eval 0.4.13 cannot apply one to these.
        (text, "held_out_choices", "acc,none", remote, [], 0.95),
        (text, "held_out_rolling", "word_perplexity,none", remote, [], 1.0),
    ):
        path = "chat/completions" if kind == chat else "completions"
        about = f"model=default,base_url={place.url}/v1/{path},num_concurrent=4,{tokenizer}"
        score, error = _lm_eval_score(place, folder, [kind, about, task, metric], more)
        found += one(
            "lm-eval", TOOLS["lm-eval"].split("==")[1], f"{task}, {kind}: {score}", score >= least, error
        )
    return found


def _lm_eval_tasks(folder: Path) -> None:
    """Questions to answer; the solution among such that end in another number; and texts as they are."""
    problems = held_out(QUESTIONS)
    rows = [{"question": one.question, "answer": str(one.answer)} for one in problems]
    choices = [
        {
            "question": one.question,
            "choices": [
                one.solution.replace(f"#### {one.answer}", f"#### {one.answer + more}")
                for more in (7, 0, 1, 2)
            ],
        }
        for one in problems
    ]
    texts = [{"text": f"{one.question} {one.solution}"} for one in problems]
    for name, lines_of in (("held_out", rows), ("held_out_choices", choices), ("held_out_rolling", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of))
        task = (HERE / f"lm_eval_{name}.yaml").read_text().replace("{here}", str(folder))
        (folder / f"{name}.yaml").write_text(task)


def _lm_eval_score(
    place: Place, folder: Path, asked: Sequence[str], more: Sequence[str]
) -> tuple[float, str]:
    """`asked`: kind of model, what it is told, task and metric. -1 and what it wrote if it came to none."""
    kind, about, task, metric = asked
    program = place.environment("lm-eval", [TOOLS["lm-eval"]]) / "lm_eval"
    out = place.work / f"lm-eval-{kind}-{task}.json"
    words = ["run", "--model", kind, "--model_args", about, "--tasks", task, "--include_path", str(folder)]
    done = place.told([str(program), *words, "--output_path", str(out), *more], folder)
    results = sorted(place.work.glob(f"{out.stem}*.json"), key=os.path.getmtime)
    if done.returncode or not results:
        return -1.0, done.stderr
    return float(json.loads(results[-1].read_text())["results"][task][metric]), done.stderr


def guidellm(place: Place) -> Told:
    package = TOOLS["guidellm"]
    program = place.environment("guidellm", [package]) / "guidellm"
    found: Told = []
    for path in ("/v1/chat/completions", "/v1/completions"):
        words = [
            "--backend",
            f"kind=openai_http,target={place.url},model=default,api_key={KEY},request_format={path}",
        ]
        words += ["--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12"]
        words += [
            "--data",
            "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
            "--disable-console-interactive",
        ]
        words += [
            "--tokenizer",
            f"kind=huggingface_auto,model={BUNDLED_MODEL}",
            "--output",
            "kind=json,path=guidellm.json",
        ]
        (place.work / "guidellm.json").unlink(missing_ok=True)
        done = place.told([str(program), "run", *words], place.work)
        made = place.work / "guidellm.json"
        counts = (
            json.loads(made.read_text())["benchmarks"][0]["metrics"]["request_totals"]
            if made.exists()
            else {}
        )
        passed = counts.get("successful", 0) >= 12 and not counts.get("errored")
        found += one(
            "guidellm", package.split("==")[1], f"run, concurrent, {path}", passed, f"{counts} {done.stderr}"
        )
    return found


def aiperf(place: Place) -> Told:
    package = TOOLS["aiperf"]
    program = place.environment("aiperf", [package]) / "aiperf"
    with contextlib.suppress(
        FileExistsError
    ):  # a name without slashes in front is what it takes for a tokenizer
        (place.work / "tokenizer").symlink_to(BUNDLED_MODEL)
    found: Told = []
    for kind in ("chat", "completions", "responses", "messages"):
        out = place.work / f"aiperf-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        words = [
            "--model",
            "default",
            "--url",
            place.url,
            "--endpoint-type",
            kind,
            "--streaming",
            "--api-key",
            KEY,
        ]
        words += [
            "--tokenizer",
            "tokenizer",
            "--concurrency",
            "4",
            "--request-count",
            "12",
            "--isl",
            "32",
            "--osl",
            "16",
        ]
        words += ["--ui", "none", "--output-artifact-dir", str(out)]
        # Told to be offline it takes no folder for a tokenizer.
        done = place.told(["env", "-u", "HF_HUB_OFFLINE", str(program), "profile", *words], place.work)
        made = sorted(out.rglob("profile_export_aiperf.json"))
        told = json.loads(made[0].read_text()) if made else {}
        count = told.get("request_count", {}).get("avg", 0)
        passed = count == 12 and not told.get("error_summary")
        shown = f"{count} {told.get('error_summary')} {done.stdout[-900:]}"
        found += one("aiperf", package.split("==")[1], f"profile --streaming, {kind}", passed, shown)
    return found


def agent(place: Place, name: str) -> Told:
    """The model writes nonsense to such prompts: what counts is that a turn is made, and ends."""
    version = next(package for package in NODE if name in package).rsplit("@", 1)[1]
    program = place.node() / "node_modules" / ".bin" / name
    folder = place.work / name
    folder.mkdir(exist_ok=True)
    if name == "codex":
        (folder / "config.toml").write_text((HERE / "codex.toml").read_text().replace("{url}", place.long))
        # Sub-agents and searching are tools of OpenAI's own servers.
        words = ["exec", "--disable", "multi_agent", "-c", 'web_search="disabled"', "--skip-git-repo-check"]
        words += ["-s", "read-only"]
    else:
        (folder / "opencode.json").write_text(
            (HERE / "opencode.json").read_text().replace("{url}", place.long)
        )
        words = ["run"]
    done = place.told([str(program), *words, "What is 12 + 30?"], folder)
    passed = done.returncode == 0 and "ERROR:" not in done.stderr and bool(done.stdout.strip())
    return one(name, version, "a turn with all its tools", passed, done.stdout + done.stderr)


def sglang(place: Place) -> Told:
    python = place.environment("sglang", ["requests==2.34.2", "openai==3.57.0"], [SGLANG]) / "python"
    return lines(
        place.told([str(python), str(HERE / "sglang_kits.py")], HERE), "sglang", SGLANG.split("==")[1]
    )


def vllm(place: Place) -> Told:
    program = place.environment("vllm", [], ["-r", str(VLLM)], shares=True) / "vllm"
    version = next(line for line in VLLM.read_text().splitlines() if line.startswith("vllm=="))
    questions = place.work / "questions.jsonl"
    rows = [{"prompt": one.question} for one in held_out(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: Told = []
    for what, (backend, endpoint, more) in VLLM_RUNS.items():
        made = place.work / "vllm.json"
        made.unlink(missing_ok=True)
        words = ["bench", "serve", "--backend", backend, "--base-url", place.url, "--endpoint", endpoint]
        words += ["--model", "default", "--tokenizer", str(BUNDLED_MODEL), "--ready-check-timeout-sec", "60"]
        words += ["--num-prompts", str(QUESTIONS), "--max-concurrency", "4"]
        words += ["--input-len", "32", "--output-len", "16"] if "random" in more else []
        words += ["--save-result", "--result-dir", str(place.work), "--result-filename", made.name]
        done = place.told([str(program), *words, *more.format(questions=questions).split()], place.work)
        told = json.loads(made.read_text()) if made.exists() else {}
        passed = (
            told.get("completed") == QUESTIONS and told.get("failed") == 0 and told["total_output_tokens"]
        )
        shown = f"{told} {done.stdout[-900:]} {done.stderr[-900:]}"
        found += one("vllm bench serve", version.split("==")[1], what, bool(passed), shown)
    return found


def tried(place: Place, name: str) -> Told:
    if name in SCRIPTS:
        return script(place, name)
    if name in AGENTS:
        return agent(place, name)
    others = {
        "node": node, "lm-eval": lm_eval, "guidellm": guidellm, "aiperf": aiperf, "sglang": sglang, "vllm": vllm,
    }  # fmt: skip
    return others[name](place)


@contextlib.contextmanager
def scripted() -> Iterator[str]:
    process = Bound(
        [sys.executable, "-m", "scripts.clients.scripted_server", KEY], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def places(work: Path) -> Iterator[Place]:
    (work / "home").mkdir(parents=True, exist_ok=True)
    plain = ["--ranks", "2", *TEMPLATE]
    flags = [*plain, "--api-key", KEY]
    shutil.rmtree(work / "long", ignore_errors=True)
    long = shaped_model(work / "long", {"max_position_embeddings": LONG})
    shutil.copy(BUNDLED_MODEL / "model.safetensors", long)
    with (
        server(flags, work / "runs") as ours,
        server(plain, work / "runs") as open_to_all,
        server([*flags, "--max-num-batched-tokens", "1024", "--model", str(long)], work / "runs") as wide,
        scripted() as calls,
    ):
        yield Place(work, ours.url, calls, wide.url, open_to_all.url)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL, help="(default: all)")
    parser.add_argument("--work", type=Path, help="where clients are installed")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/clients.json"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    found: Told = []
    with contextlib.ExitStack() as stack:
        scratch = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clients-")))
        place = stack.enter_context(places(scratch.resolve()))
        for name in options.only:
            for told in tried(place, name):
                print(told["client"], "|", told["tried"], "|", told["result"], flush=True)
                if told["result"] == "failed":
                    print(told["detail"], flush=True)
                found.append(told)
    shown = [{**told, "detail": ""} if told["result"] == "passed" else told for told in found]
    write_result(options.out, {"tried": shown})
    sys.exit(any(told["result"] == "failed" for told in found))


if __name__ == "__main__":
    main()
