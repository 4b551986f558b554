"""The process that owns one SGLang engine: ``python -P -m zerokl.alignment.sglang.engine_child FD``.

SGLang's scheduler kills its parent when it crashes, and its plugin errors are only logged; so the engine lives in a
process of its own, which proves its hooks before it says it is ready. It ends, with every process SGLang started, as
soon as the socket to its owner closes.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from zerokl.alignment import routing_replay
from zerokl.alignment.routing import Router
from zerokl.alignment.sglang import protocol
from zerokl.alignment.sglang.config import (
    ARCHITECTURE_KEY,
    DISABLED_HOOKS_KEY,
    SEGMENTS_KEY,
    TRACE_KEY,
    TRANSFER_KEY,
    EngineConfig,
    inspect_model,
)
from zerokl.alignment.sglang.errors import EngineError
from zerokl.alignment.sglang.report import check_reports
from zerokl.alignment.tensor_parallel import rank_name
from zerokl.alignment.types import Request, WeightSpan

_RANK_CALL = "zerokl.alignment.sglang.rank_calls.call"
_SLACK = 8  # SGLang keeps this many positions of its limits to itself; the owner checks the exact ones
_FLUSH_S = 30.0


def main(fd: int) -> None:
    """Start the engine the first message describes, then serve commands until the owner closes the connection."""
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    os.register_at_fork(after_in_child=sock.close)  # or the owner would not see this process end
    connection: protocol.Connection[protocol.Command] = protocol.Connection(sock, protocol.Command)
    start = connection.receive()
    if not isinstance(start, protocol.Start):
        raise TypeError(f"the first message must be Start, got {type(start).__name__}")
    commands: queue.SimpleQueue[protocol.Command] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, commands), daemon=True).start()
    server = _reply(connection, lambda: _Server(start.config))
    if server is None:
        return
    connection.send(protocol.Ready(server.manifest))
    while not isinstance(command := commands.get(), protocol.Close):
        reply = _reply(connection, lambda: server.serve(command))
        if reply is not None:
            connection.send(reply)
    server.close()


def _listen(connection: protocol.Connection[protocol.Command], commands: queue.SimpleQueue[protocol.Command]) -> None:
    """Hand commands to the main thread; end the whole process group when the owner is gone."""
    try:
        while True:
            commands.put(connection.receive())
    except Exception as error:  # noqa: BLE001  (whatever it was, nobody is left to serve)
        print(f"connection to the owner ended: {type(error).__name__}: {error}", flush=True)
        os.killpg(os.getpgid(0), signal.SIGKILL)


def _reply(connection: protocol.Connection[protocol.Command], action: Callable[[], Any]) -> Any:
    """The action's result; a failure is sent to the owner, who raises it, and None returned."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001  (raised again by the owner)
        connection.send(protocol.Failed(type(error).__name__, str(error)))
        return None


class _Server:
    """The engine and the handlers of its commands; everything runs on SGLang's own event loop."""

    def __init__(self, config: EngineConfig) -> None:
        import torch

        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            from zerokl.alignment.sglang import cpu_shims

            cpu_shims.activate()
        model = inspect_model(config.model_path, config.architecture)
        _skip_unused_models(model.architecture.sglang_module)

        self.config = config
        self.capture = model.router if config.capture_experts else None
        self.engine = _engine_class(on_cpu=on_cpu)(**_server_args(config, on_cpu=on_cpu))
        self._warm_up()
        reports = None if config.stock else self._reports()
        self.manifest = {
            "engine": "sglang",
            "stock": config.stock,
            "hooks": None if reports is None else reports[0],
            "ranks": reports,
            "config": {name: value for name, value in vars(config).items() if name != "log_path"},
            "versions": _versions(),
        }

    def serve(self, command: protocol.Command) -> protocol.Message:
        match command:
            case protocol.Generate(requests):
                self._check_weights()
                aborts = self.config.transfer is not None
                generations = self._run(_generate(self.engine, requests, self.capture, aborts=aborts))
                if self.config.tensor_parallel > 1 and not self.config.stock:
                    self._reports()  # every rank sampled the same
                return protocol.Generated(generations)
            case protocol.Serving():
                return self._serving()
            case protocol.WeightsDigest():
                return protocol.Digests(self._all_digests("digest", {}))
            case protocol.FlipWeightBit(name, element, bit):
                last = [self.config.tensor_parallel - 1]
                self._call_loader("flip_bit", {"name": name, "element": element, "bit": bit}, last)
                self._flush()
                return protocol.Done()
            case protocol.Trace(folder, plant):
                if not self.config.trace:
                    raise EngineError("this engine was not started with EngineConfig.trace: it cannot record")
                self._call_loader("trace", {"folder": folder, "plant": None if plant is None else asdict(plant)})
                return protocol.Done()
            case protocol.FlushCache():
                self._flush()
                return protocol.Done()
        raise EngineError(f"unexpected command {type(command).__name__}")

    def close(self) -> None:
        self.engine.shutdown()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.engine.loop.run_until_complete(coroutine)

    def _warm_up(self) -> None:
        """Run one prefill and one decode step."""
        self.engine.generate(input_ids=[0, 1], sampling_params={"max_new_tokens": 2, "ignore_eos": True})
        self._flush()

    def _reports(self) -> list[dict[str, Any]]:
        """What every rank's hooks report: each took part in every forward pass so far, and all ranks sampled alike."""
        reports = self.engine.get_server_info()["internal_states"][0].get("zerokl")
        check_reports(reports, self.config.tensor_parallel)
        return reports

    def _serving(self) -> protocol.Served:
        """The version that all ranks hold, if they hold the same; the states they are in."""
        reports = self.engine.get_server_info()["internal_states"][0].get("zerokl") or []
        found = [report["weights"] for report in reports if "weights" in report]
        if not found:
            raise EngineError("this engine was not started with EngineConfig.transfer: no weights come to it")
        states, versions = {rank["state"] for rank in found}, {rank["version"] for rank in found}
        return protocol.Served(versions.pop() if len(versions) == 1 else None, ", ".join(sorted(states)))

    def _check_weights(self) -> None:
        """Refuse to sample with weights that were never given to this engine; a transfer under way is waited for."""
        if self.config.transfer is not None and (served := self._serving()).version is None:
            raise EngineError(f"the engine holds no complete version of the weights (state {served.state})")

    def _flush(self) -> None:
        # a request's answer may leave the scheduler a moment before the request does: let SGLang wait for that
        result = self._run(self.engine.tokenizer_manager.flush_cache(timeout_s=_FLUSH_S))
        if not result.success:
            raise EngineError(f"SGLang did not flush its cache: {result.message}")

    def _all_digests(self, function: str, request: dict[str, Any]) -> dict[str, str]:
        """The digests that a function of the weight loader answers on every rank, by `rank_name`."""
        ranks = self.config.tensor_parallel
        answers = enumerate(self._call_loader(function, request))
        return {rank_name(name, rank, ranks): digest for rank, own in answers for name, digest in own.items()}

    def _call_loader(self, function: str, request: dict[str, Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Run one function of the weight loader on the live model of all ranks, or of ``ranks``, inside SGLang's
        weight-update window; their answers.

        SGLang calls such a function with the model and the tensors sent, and drops what it returns. So the request
        goes in as one small tensor of JSON, and the answers come back in files only this call knows (`rank_calls`).
        """
        import torch

        ranks = range(self.config.tensor_parallel) if ranks is None else ranks
        stem = Path(tempfile.gettempdir()) / f"answer-{secrets.token_hex(8)}.json"
        answers = {rank: str(stem.with_suffix(f".{rank}.json")) for rank in ranks}
        call = {"function": f"{self.config.weight_loader}.{function}", "request": request, "answers": answers}
        payload = torch.frombuffer(bytearray(json.dumps(call).encode()), dtype=torch.uint8)
        _require("begin_weight_update", self.engine.begin_weight_update())
        try:
            sent = self.engine.update_weights_from_tensor(
                [("request", payload)], load_format=_RANK_CALL, flush_cache=False
            )
        finally:
            ended = self.engine.end_weight_update()
        _require("update_weights_from_tensor", sent)
        _require("end_weight_update", ended)
        try:
            results = [json.loads(Path(answer).read_text()) for answer in answers.values()]
        finally:
            for answer in answers.values():
                Path(answer).unlink(missing_ok=True)
        for result in results:
            if "error" in result:
                raise EngineError(result["error"])
        return [result["result"] for result in results]


def _engine_class(*, on_cpu: bool) -> Callable[..., Any]:
    if on_cpu:
        from zerokl.alignment.sglang.forked_engine import ForkedEngine

        return ForkedEngine
    import sglang

    return sglang.Engine


def _require(call: str, outcome: tuple[bool, str]) -> None:
    """SGLang reports refusals as (False, message) and raises nothing."""
    success, message = outcome
    if not success:
        raise EngineError(f"SGLang refused {call}: {message}")


async def _generate(
    engine: Any, requests: Sequence[Request], capture: Router | None, *, aborts: bool
) -> tuple[protocol.Tokens, ...]:
    """Submit every request at its arrival time; the results come in the order of the requests.

    ``capture``: the router whose choices come with the results. ``aborts``: new weights may end requests early.
    """

    async def one(request: Request) -> dict[str, Any]:
        await asyncio.sleep(request.arrival_s)
        return await engine.async_generate(
            input_ids=list(request.input_ids),
            sampling_params=_sampling_params(request),
            return_logprob=True,
            return_routed_experts=capture is not None,
        )

    results = await asyncio.gather(*(one(request) for request in requests), return_exceptions=True)
    for index, result in enumerate(results):
        if isinstance(result, BaseException):
            raise EngineError(f"request {index}: {type(result).__name__}: {result}") from result
    answered = enumerate(zip(requests, results, strict=True))
    return tuple(_tokens(index, request, result, capture, aborts) for index, (request, result) in answered)  # type: ignore[arg-type]


def _routed(index: int, prompt: int, result: dict[str, Any], router: Router) -> bytes:
    """The request's routing record. SGLang hands its captured int32 indices on as base64."""
    captured = np.frombuffer(base64.b64decode(result["meta_info"].get("routed_experts", "")), "<i4")
    tokens = prompt + len(result["output_ids"]) - 1
    return routing_replay.pack(captured, router, tokens, f"request {index}").tobytes()


def _sampling_params(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "sampling_seed": sampling.seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
    }


def _tokens(
    index: int, request: Request, result: dict[str, Any], capture: Router | None, aborts: bool
) -> protocol.Tokens:
    meta, ids = result["meta_info"], tuple(result["output_ids"])
    reason = meta["finish_reason"]
    if reason["type"] not in ("stop", "length") and not (aborts and reason["type"] == "abort"):
        raise EngineError(f"request {index} ended by {reason['type']}: {reason.get('message', 'no reason given')}")
    logprobs = [value for value, _, _ in meta.get("output_token_logprobs", ())]
    raw = meta.get(protocol.RAW_LOGPROB, [np.nan] * len(ids))  # stock engines report none
    if not len(ids) == len(logprobs) == len(raw):
        raise EngineError(f"request {index}: {len(ids)} tokens, {len(logprobs)} and {len(raw)} log-probabilities")
    return protocol.Tokens(
        output_ids=ids,
        logprobs=np.array(logprobs, dtype="<f4").tobytes(),
        raw_logprobs=np.array(raw, dtype="<f4").tobytes(),
        finish_reason=reason["type"],
        weight_version=meta["weight_version"],
        cached_tokens=meta.get("cached_tokens", 0),
        routed_experts=None if capture is None or not ids else _routed(index, len(request.input_ids), result, capture),
        weight_spans=tuple(WeightSpan(**span) for span in meta.get("weight_versions", ())),
    )


def _server_args(config: EngineConfig, *, on_cpu: bool) -> dict[str, Any]:
    args: dict[str, Any] = {
        "model_path": config.model_path,
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "attention_backend": "torch_native" if config.stock else "zerokl",
        "context_length": config.context_length + _SLACK,
        "max_running_requests": config.max_running_requests,
        "max_total_tokens": config.max_total_tokens + _SLACK * config.page_size,
        "chunked_prefill_size": config.chunked_prefill_size,
        "page_size": config.page_size,
        "disable_radix_cache": not config.radix_cache,
        "sleep_on_idle": True,  # or an idle scheduler spins, on a core that the trainer needs
        "disable_overlap_schedule": True,  # log-probabilities leave the sampler as Python floats
        "custom_weight_loader": [_RANK_CALL],
        "tp_size": config.tensor_parallel,
        "disable_shared_experts_fusion": True,  # the shared expert is added last, not as one slot among others
        "enable_return_routed_experts": config.capture_experts,
        "disable_cuda_graph": on_cpu or config.transfer is not None,  # new weights lie elsewhere
        "log_level": "warning",
    }
    if not config.stock:
        args["json_model_override_args"] = json.dumps(_overrides(config))
    if on_cpu:
        args |= {"device": "cpu", "mem_fraction_static": 0.3}
    return args


def _overrides(config: EngineConfig) -> dict[str, Any]:
    """What the hooks need to know, as additions to the model's configuration: that reaches every rank."""
    overrides: dict[str, Any] = {
        SEGMENTS_KEY: config.segments,
        DISABLED_HOOKS_KEY: list(config.disabled_hooks),
        TRACE_KEY: config.trace,
    }
    if config.architecture is not None:
        overrides[ARCHITECTURE_KEY] = asdict(config.architecture)
    if config.transfer is not None:
        overrides[TRANSFER_KEY] = asdict(config.transfer)
    return overrides


def _skip_unused_models(needed: str) -> None:
    """Keep SGLang from importing its two hundred other model files, which takes seconds in each process."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise EngineError("SGLang is not installed: pip install sglang==0.5.23")
    models = (Path(spec.origin).parent / "srt" / "models").glob("*.py")
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(m.stem for m in models if m.stem != needed)


def _versions() -> dict[str, str]:
    packages = ("sglang", "torch", "transformers", "zerokl")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


if __name__ == "__main__":
    main(int(sys.argv[1]))
