from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.gateway import probe
from elastic_ep.gateway.settings import SamplingDefaults
from elastic_ep.group.metrics import ERROR_STATUSES, FINISH_REASONS, Metrics
from elastic_ep.group.port import Health, LossCause
from elastic_ep.machines.membership.events import GroupState
from elastic_ep.wire.messages import Member, PageCounts, RankState
from tests.gateway.conftest import Start
from tests.gateway.fakes import MODEL, TEMPLATE, FakeBackend, never_ends, sample_text, says

pytestmark = pytest.mark.anyio


async def test_health_follows_the_ranks(start: Start) -> None:
    backend = FakeBackend()
    running = await start(backend)
    for serving, status in ((8, 200), (1, 200), (0, 503)):
        backend.serving = serving
        async with running.http.get(f"{running.url}/health") as response:
            assert response.status == status
            said = await response.json()
        assert said["serving_ranks"] == serving
        assert said["healthy"] == (said["reason"] == "") == (status == 200)
        async with running.http.get(f"{running.url}/live") as response:
            assert response.status == 200


async def test_relaunch_takes_one_rank_or_all(start: Start) -> None:
    running = await start()
    path = "/v1/fault_tolerance/relaunch"
    assert await running.post(path, {"rank": 4}) == (200, {"relaunched": [], "running": [4]})
    assert await running.post(path, {}) == (200, {"relaunched": [2, 3], "running": []})
    async with running.http.post(running.url + path) as response:  # no body at all
        assert response.status == 200
    assert running.backend.relaunches == [4, None, None]
    for body, status in (
        ({"rank": 8}, 404),
        ({"rank": "2"}, 400),
        ({"rank": -1}, 400),
        ({"rank": True}, 400),
    ):
        got, answer = await running.post(path, body)
        assert got == status, body
        assert answer["error"]["param"] == "rank"
    got, _ = await running.post(path, {"padding": "a" * 5000})
    assert got == 413


async def test_a_rank_is_killed_only_where_there_is_an_admin_key(start: Start) -> None:
    path, body = "/v1/fault_tolerance/kill", {"rank": 4, "incarnation": 2}
    for keys in ((), ("k1",)):
        running = await start(api_keys=keys)
        async with running.http.post(
            running.url + path, json=body, headers={"Authorization": "Bearer k1"}
        ) as response:
            assert response.status == 403
            assert "--admin-key" in (await response.json())["error"]["message"]
        assert running.backend.kills == []


async def test_drain_and_scale_say_what_they_cannot_do(start: Start) -> None:
    drain, scale = "/v1/fault_tolerance/drain", "/scale_elastic_ep"
    running = await start()
    for path, body in ((drain, {"rank": 2}), (scale, {"new_data_parallel_size": 4})):
        assert (await running.post(path, body))[0] == 403, "there is no admin key"
    assert await running.post("/is_scaling_elastic_ep", {}) == (200, {"is_scaling_elastic_ep": False})
    running = await start(admin_key="boss")
    running.http.headers["Authorization"] = "Bearer boss"
    told = {"rank": 2, "incarnation": 1, "state": "Draining", "data_parallel_size": 7}
    assert await running.post(drain, {"rank": 2}) == (200, told)
    assert await running.post(drain, {"rank": 2, "drain_timeout": 0}) == (200, told)
    assert running.backend.drains == [(2, 120), (2, 0)]
    got, answer = await running.post(scale, {"new_data_parallel_size": 4, "drain_timeout": 3})
    assert (got, answer["message"], answer["ranks"]) == (
        200,
        "Scaled to 4 data parallel engines",
        [0, 1, 2, 3],
    )
    wrong: tuple[tuple[str, dict[str, Any], int, str | None], ...] = (
        (drain, {"rank": 7}, 409, None),
        (drain, {"drain_timeout": 3}, 400, "rank"),
        (drain, {"rank": 1, "drain_timeout": -1}, 400, "drain_timeout"),
        (scale, {"new_data_parallel_size": 9}, 400, "new_data_parallel_size"),
        (scale, {"new_data_parallel_size": 0}, 400, "new_data_parallel_size"),
        (scale, {"new_data_parallel_size": "4"}, 400, "new_data_parallel_size"),
        (scale, {"new_data_parallel_size": 4, "drain_timeout": 1.5}, 400, "drain_timeout"),
        (scale, {"new_data_parallel_size": 5}, 408, None),
    )
    for path, body, status, param in wrong:
        got, answer = await running.post(path, body)
        assert (got, answer["error"]["param"]) == (status, param), body


async def test_a_kill_names_one_incarnation(start: Start) -> None:
    running = await start(admin_key="boss")
    running.http.headers["Authorization"] = "Bearer boss"
    path = "/v1/fault_tolerance/kill"
    for incarnation in (2, 1):
        answer = {"killed": incarnation == 2, "incarnation": 2}
        assert await running.post(path, {"rank": 4, "incarnation": incarnation}) == (200, answer)
    assert running.backend.kills == [(4, 2), (4, 1)]
    for body, status, param in (
        ({"rank": 8, "incarnation": 1}, 404, "rank"),
        ({"rank": 4}, 400, "incarnation"),
        ({"incarnation": 2}, 400, "rank"),
        ({"rank": 4, "incarnation": 0}, 400, "incarnation"),
        ({"rank": 4, "incarnation": True}, 400, "incarnation"),
        ({}, 400, "rank"),
    ):
        got, told = await running.post(path, body)
        assert (got, told["error"]["param"]) == (status, param), body
    got, _ = await running.post(path, {"rank": 4, "incarnation": 2, "padding": "a" * 5000})
    assert got == 413
    assert len(running.backend.kills) == 2


async def test_status_is_as_the_issue_says(start: Start) -> None:
    running = await start()
    async with running.http.get(f"{running.url}/v1/fault_tolerance/status") as response:
        assert await response.json() == {
            "state": "Serving",
            "epoch": 3,
            "step": 1000,
            "tolerates": 1,
            "engines": [
                {
                    "id": 0,
                    "status": "healthy",
                    "state": "Serving",
                    "incarnation": 1,
                    "pid": 4711,
                    "running": 2,
                    "waiting": 0,
                    "reason": "",
                    "last_loss": None,
                    "kv_cache_usage": 0.0,
                    "kv_pages": {"device": 0, "held": 0, "named": 0, "shelf": 0, "shelf_bytes": 0},
                }
            ],
            "idle": False,
            "tolerates_hosts": 0,
            "data_parallel_size": 0,
            "scaling": False,
        }


async def test_requests_are_counted(start: Start) -> None:
    running = await start()
    await running.post("/v1/completions", {"prompt": "A", "max_tokens": 50})
    await running.post("/v1/completions", {"prompt": "A", "max_tokens": 2})
    await running.post("/v1/completions", {"prompt": 7})
    async with running.http.get(f"{running.url}/metrics") as response:
        assert response.content_type == "text/plain"
        lines = (await response.text()).splitlines()
    tokens = len(sample_text().encode("The answer is 7.")) + 1
    for line in (
        "elastic_ep:prompt_tokens_total 2.0",
        f"elastic_ep:generation_tokens_total {tokens + 2}.0",
        'elastic_ep:request_success_total{finished_reason="stop"} 1.0',
        'elastic_ep:request_success_total{finished_reason="length"} 1.0',
        'elastic_ep:http_errors_total{status="400"} 1.0',
        "elastic_ep:time_to_first_token_seconds_count 2.0",
        f"elastic_ep:inter_token_latency_seconds_count {tokens}.0",
        'elastic_ep:time_to_first_token_seconds_bucket{le="+Inf"} 2.0',
    ):
        assert line in lines


def test_a_ranks_page_counters_go_on_through_its_incarnations() -> None:
    """Whatever is scraped, and however often: no scrape sees them fall, and each incarnation's count is in them once."""
    metrics, name = Metrics(), 'elastic_ep:prefix_cache_hits_total{rank="1"}'
    seen = []
    for incarnation, hits in ((1, 5), (1, 5), (1, 9), (1, 0), (1, 9), (2, 0), (2, 4), (2, 4)):
        metrics.pages(Member(1, incarnation), PageCounts(hits=hits, shelf_pages=hits))
        (line,) = [line for line in metrics.render().decode().splitlines() if line.startswith(name)]
        seen.append(float(line.split()[1]))
    assert seen == [5, 5, 9, 9, 9, 9, 13, 13]
    assert 'elastic_ep:shelf_pages{rank="1"} 4.0' in metrics.render().decode().splitlines()


def test_metrics_of_the_control_plane() -> None:
    metrics = Metrics()
    metrics.requests(running=5, waiting=2)
    metrics.rank_state(3, RankState.JOINING)
    metrics.rank_state(3, RankState.SERVING)
    metrics.epoch.set(7)
    metrics.rank_lost(LossCause.KILLED)
    metrics.failover_stall.observe(0.0015)
    metrics.rejoin_pause.observe(0.003)
    metrics.replayed.inc(4)
    metrics.moved.inc(3)
    metrics.poisoned_steps.inc()
    metrics.messages_dropped(2)
    metrics.messages_dropped(6)
    lines = metrics.render().decode().splitlines()
    for line in (
        "elastic_ep:num_requests_running 5.0",
        "elastic_ep:num_requests_waiting 2.0",
        'elastic_ep:rank_state{rank="3",state="Joining"} 0.0',
        'elastic_ep:rank_state{rank="3",state="Serving"} 1.0',
        "elastic_ep:epoch 7.0",
        'elastic_ep:rank_losses_total{cause="killed"} 1.0',
        'elastic_ep:failover_stall_seconds_bucket{le="0.001"} 0.0',
        'elastic_ep:failover_stall_seconds_bucket{le="0.002"} 1.0',
        "elastic_ep:rejoin_pause_seconds_count 1.0",
        "elastic_ep:requests_replayed_total 4.0",
        "elastic_ep:requests_moved_total 3.0",
        "elastic_ep:poisoned_steps_total 1.0",
        "elastic_ep:dropped_messages_total 6.0",
    ):
        assert line in lines


def test_series_with_labels_are_there_before_anything_has_happened() -> None:
    """To a series that appears with its first event, increase() is blind."""
    metrics = Metrics()
    at_first = {line.rpartition(" ")[0] for line in metrics.render().decode().splitlines()}
    for cause in LossCause:
        metrics.rank_lost(cause)
    for reason in FINISH_REASONS:
        metrics.finished(reason)
    for status in ERROR_STATUSES:
        metrics.http_error(status)
    for source in ("peer", "checkpoint"):
        metrics.expert_copied(source)
    assert {line.rpartition(" ")[0] for line in metrics.render().decode().splitlines()} == at_first
    zeros = [line for line in Metrics().render().decode().splitlines() if "rank_losses_total{" in line]
    assert len(zeros) == len(LossCause)
    assert all(line.endswith(" 0.0") for line in zeros)


async def test_what_is_read_is_read_at_every_scrape(start: Start) -> None:
    running = await start()
    for scrapes in (1, 2):
        async with running.http.get(f"{running.url}/metrics") as response:
            assert response.status == 200
        assert running.backend.scrapes == scrapes


def test_what_is_set_is_shown() -> None:
    metrics = Metrics()
    metrics.kv_cache({0: 0.5, 1: 0.25, 2: 0.9}, members=[0, 1])
    for expected in (2, 0):
        metrics.group(GroupState.DEGRADED, idle=True, tolerates=expected, tolerates_hosts=expected - 1)
        lines = metrics.render().decode().splitlines()
        for line in (
            f"elastic_ep:tolerates {expected}.0",
            f"elastic_ep:tolerates_hosts {expected - 1}.0",
            "elastic_ep:group_idle 1.0",
            'elastic_ep:group_state{state="Degraded"} 1.0',
            'elastic_ep:group_state{state="Serving"} 0.0',
            'elastic_ep:rank_kv_cache_usage_perc{rank="2"} 0.9',
            "elastic_ep:kv_cache_usage_perc 0.375",
        ):
            assert line in lines


def test_the_fast_histogram_counts_as_prometheus_does() -> None:
    metrics = Metrics()
    # A value on a bound belongs to that bound's bucket.
    for seconds in (0.0005, 0.001, 0.0011, 100.0):
        metrics.tokens(1, seconds)
    lines = metrics.render().decode().splitlines()
    name = "elastic_ep:inter_token_latency_seconds"
    assert f'{name}_bucket{{le="0.001"}} 2.0' in lines
    assert f'{name}_bucket{{le="0.0025"}} 3.0' in lines
    assert f'{name}_bucket{{le="10.0"}} 3.0' in lines
    assert f'{name}_bucket{{le="+Inf"}} 4.0' in lines
    assert f"{name}_sum 100.0026" in lines


async def test_tokenize_and_back(start: Start) -> None:
    running = await start()
    status, body = await running.post("/tokenize", {"prompt": "Zoë has 12 🍎"})
    assert status == 200
    assert body["count"] == len(body["tokens"])
    assert await running.post("/detokenize", {"tokens": body["tokens"]}) == (200, {"prompt": "Zoë has 12 🍎"})


async def test_version_and_description(start: Start) -> None:
    running = await start()
    async with running.http.get(f"{running.url}/version") as response:
        assert await response.json() == {"version": "0.0"}
    async with running.http.get(f"{running.url}/openapi.json") as response:
        described = await response.json()
    assert described["openapi"].startswith("3.1")
    assert "/v1/chat/completions" in described["paths"]


async def test_defaults_come_from_the_generation_config(start: Start, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "top_p": 0.95}')
    running = await start(defaults=SamplingDefaults.from_folder(tmp_path))
    await running.post("/v1/completions", {"prompt": "A", "top_p": 0.5})
    params = running.backend.submitted[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.5)


def test_generation_config_may_be_missing_or_greedy(tmp_path: Path) -> None:
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert SamplingDefaults.from_folder(tmp_path).temperature == 0.0
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="generation_config"):
        SamplingDefaults.from_folder(tmp_path)


async def test_the_names_of_others_say_the_same_as_ours(start: Start) -> None:
    running = await start(FakeBackend(reply=says("One two three.")))
    for _ in range(2):
        status, _ = await running.post("/v1/completions", {"model": MODEL, "prompt": "Say", "max_tokens": 9})
        assert status == 200
    running.metrics.requests(5, 2)
    for rank, hits in ((0, 30), (1, 12)):
        running.metrics.pages(Member(rank, 1), PageCounts(queries=60, hits=hits))
        running.metrics.rank_state(rank, RankState.SERVING if rank else RankState.FAILED)
    async with running.http.get(f"{running.url}/metrics") as response:
        lines = (line.rpartition(" ") for line in (await response.text()).splitlines() if line[0] != "#")
    found = {name: float(value) for name, _, value in lines}
    vllm, sglang = f'{{engine="0",model_name="{MODEL}"}}', f'{{model_name="{MODEL}"}}'
    ours = {
        name.removeprefix("elastic_ep:"): value
        for name, value in found.items()
        if name.startswith("elastic_ep")
    }
    assert ours["generation_tokens_total"] > 4
    assert ours["e2e_request_latency_seconds_count"] == 2
    assert ours["request_prefill_time_seconds_count"] == ours["request_queue_time_seconds_count"] == 2
    assert ours["request_generation_tokens_sum"] == ours["generation_tokens_total"]
    assert ours["request_prompt_tokens_sum"] == ours["prompt_tokens_total"]
    assert ours["request_params_max_tokens_sum"] == 18
    for name in (
        "generation_tokens_total",
        "e2e_request_latency_seconds_sum",
        "time_to_first_token_seconds_count",
    ):
        assert found[f"vllm:{name}{vllm}"] == found[f"sglang:{name}{sglang}"] == ours[name]
    assert found[f"vllm:num_requests_running{vllm}"] == found[f"sglang:num_running_reqs{sglang}"] == 5
    assert found[f"vllm:num_requests_waiting{vllm}"] == found[f"sglang:num_queue_reqs{sglang}"] == 2
    assert found[f"vllm:prefix_cache_hits_total{vllm}"] == 42
    assert found[f"sglang:cache_hit_rate{sglang}"] == 42 / 120
    assert found[f"sglang:num_requests_total{sglang}"] == 2
    healthy = [found[f'vllm:engine_healthy{{engine="{rank}",model_name="{MODEL}"}}'] for rank in (0, 1)]
    assert healthy == [0, 1]


async def test_probes_of_load_balancers(start: Start) -> None:
    running = await start(api_keys=("key",))
    for serving, status in ((8, 200), (0, 503)):
        running.backend.serving = serving
        for method in ("GET", "POST"):
            async with running.http.request(method, f"{running.url}/ping") as response:
                assert (response.status, await response.read()) == (status, b"")


async def test_a_probe_has_a_token_generated(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await start(api_keys=("key",))

    async def asked() -> tuple[int, str]:
        async with running.http.get(f"{running.url}/health_generate") as response:
            return response.status, (await response.json())["reason"]

    assert await asked() == (200, "")
    (submitted,) = running.backend.submitted
    assert submitted.params.max_tokens == 1
    running.backend.capacity = 0
    assert await asked() == (200, "")
    running.backend.capacity = None
    running.backend.reply = never_ends("")
    monkeypatch.setattr(probe, "DEADLINE_S", 0.2)
    for answer in await asyncio.gather(asked(), asked()):
        assert answer == (503, "no token came within 0 s")
    assert len(running.backend.submitted) == 2, "who asks at once shares one request"
    await running.backend.arrived.get()
    await running.backend.arrived.get()
    while not running.backend.arrived.empty():
        running.backend.arrived.get_nowait()
    monkeypatch.setattr(probe, "DEADLINE_S", 1.0)
    slow = asyncio.create_task(asked())
    await running.backend.arrived.get()
    running.backend.reply = says("one")
    key = {"Authorization": "Bearer key"}
    async with running.http.post(
        f"{running.url}/v1/completions", json={"prompt": "x"}, headers=key
    ) as answered:
        assert answered.status == 200
    assert await slow == (200, ""), "tokens come, though not for it"
    running.backend.serving = 0
    assert await asked() == (503, "no rank serves")
    pause = Health(True, "Holding", 0, "no rank serves; ranks on their way or to be launched: 2")
    running.backend.health = lambda: pause  # type: ignore[method-assign]
    running.backend.reply = says("one")
    assert await asked() == (200, ""), "the pause of a loss is none of the service"


async def test_load_is_what_is_being_answered(start: Start) -> None:
    running = await start(FakeBackend(never_ends("one")))

    async def load() -> int:
        async with running.http.get(f"{running.url}/load") as response:
            return int((await response.json())["server_load"])

    assert await load() == 0
    asked = {"prompt": "Count", "stream": True}
    async with running.http.post(f"{running.url}/v1/completions", json=asked) as response:
        await response.content.readline()
        assert await load() == 1
    running.backend.reply = says("one")
    assert (await running.post("/v1/completions", {"prompt": "Count"}))[0] == 200
    async with asyncio.timeout(10):
        await running.backend.streams[0].cancelled.wait()
    assert await load() == 0


async def test_several_names(start: Start) -> None:
    running = await start(other_names=("second",))
    async with running.http.get(f"{running.url}/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == [MODEL, "second"]
    for name, status in ((MODEL, 200), ("second", 200), ("third", 404)):
        got, body = await running.post("/v1/completions", {"model": name, "prompt": "x"})
        assert got == status
        assert status != 200 or body["model"] == MODEL, "the first is the model's own"
        async with running.http.get(f"{running.url}/v1/models/{name}") as response:
            assert response.status == status


async def test_what_is_served(start: Start) -> None:
    running = await start(tool_call_parser="hermes", api_keys=())
    async with running.http.get(f"{running.url}/server_info") as response:
        about = await response.json()
    assert (about["model"], about["max_model_len"], about["tool_call_parser"]) == (MODEL, 256, "hermes")
    assert "api_keys" not in about
    for path in ("/model_info", "/get_model_info"):
        async with running.http.get(running.url + path) as response:
            assert (await response.json())["model_path"] == MODEL
    async with running.http.get(f"{running.url}/tokenizer_info") as response:
        about = await response.json()
    assert about["chat_template"] == TEMPLATE
    assert about["special_tokens"] == {"eos_token": "<|im_end|>"}
    assert about["eos_token"] == "<|im_end|>", "as vLLM's clients look for it"


async def test_a_conversation_is_tokenised_as_it_is_answered(start: Start) -> None:
    running = await start()
    messages = [{"role": "user", "content": "Zoë"}]
    status, body = await running.post("/tokenize", {"messages": messages, "return_token_strs": True})
    assert status == 200
    await running.post("/v1/chat/completions", {"messages": messages})
    assert tuple(body["tokens"]) == running.backend.submitted[0].prompt
    assert body["token_strs"][0] == "<|im_start|>"
    assert len(body["token_strs"]) == body["count"]
    open_end = {
        "messages": [*messages, {"role": "assistant", "content": "So"}],
        "continue_final_message": True,
    }
    _, longer = await running.post("/tokenize", open_end)
    assert longer["tokens"][: len(body["tokens"])] == body["tokens"]
    for wrong, param in (
        ({}, "prompt"),
        ({"prompt": "x", "messages": messages}, "prompt"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": messages, "chat_template": "x"}, "chat_template"),
        ({"messages": messages, "model": "other"}, "model"),
    ):
        _, refused = await running.post("/tokenize", wrong)
        assert refused["error"]["param"] == param
