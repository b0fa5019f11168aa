"""Settings of the engine and of the server.

One struct names every setting once: command-line flags, `SPECSERVE_*` environment variables and the YAML file are all
derived from its fields (`specserve.cli.options`). Precedence: flag, environment, file, default.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]  # an empty one is mostly a variable that nobody set


Exact: TypeAlias = Literal["auto", "on", "off"]
Quantization: TypeAlias = Literal["none", "int8", "int4", "fp8"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine process needs; all of it is known before the model is read."""

    model: Annotated[str, Meta(description="local Hugging Face directory or hub id; empty is the default model")] = ""
    revision: Annotated[Text | None, Meta(description="hub revision of the model")] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="where the model runs")] = "auto"
    dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Meta(description="weights and arithmetic")] = "auto"
    kernels: Annotated[
        Literal[
            "auto",
            "native",
            "amx",
            "avx512_bf16",
            "neon_bf16",
            "avx512_vnni",
            "avx512",
            "avx2_vnni",
            "avx2",
            "generic",
            "triton",
            "torch",
        ],
        Meta(
            description="native: C++ on a CPU, Triton's on CUDA, or no start; amx to generic: C++ on a CPU with these "
            "instructions, or no start; triton: Triton's or no start; torch: none; auto: native where that can be, "
            "else torch"
        ),
    ] = "auto"
    quantization: Annotated[
        Quantization,
        Meta(description="hold the base model's weights in fewer bits: int8 or int4 on a CPU, int8 or fp8 on CUDA"),
    ] = "none"
    exact: Annotated[
        Exact,
        Meta(
            description="a row's bits do not follow the step's size, so that drafts change none; auto: always on the "
            "native CPU path, on CUDA from compute capability 9.0 on with weights of 16 or 8 bits; on: that or no "
            "start; off: on CUDA matrix products as cuBLAS chooses them"
        ),
    ] = "auto"
    cuda_graphs: Annotated[bool, Meta(description="capture a step's launches on CUDA and replay them")] = True
    max_model_len: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="tokens of prompt plus output; default: the model's")
    ] = None
    kv_cache_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="memory for the KV cache, GiB; default: 2, on CUDA four fifths of what model and steps leave"),
    ] = None
    block_size: Annotated[int, Meta(ge=1, le=256, description="tokens in one KV block")] = 16
    max_num_seqs: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        Meta(description="sequences that run at the same time; default: 64, on CUDA 256"),
    ] = None
    max_batched_tokens: Annotated[
        Annotated[int, Meta(ge=16)] | None, Meta(description="rows of one forward pass; default: 512, on CUDA 2048")
    ] = None
    max_prefill_rows: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="of those, rows of prompt when other sequences decode; smaller is smoother; "
            "default: 128, on CUDA 1024"
        ),
    ] = None
    max_waiting: Annotated[
        int, Meta(ge=0, description="requests that may wait beside as many as may run; more are answered 429")
    ] = 1024
    max_waiting_tokens: Annotated[
        int,
        Meta(
            ge=0, description="tokens of waiting requests, prompts and expected outputs; beyond these are answered 429"
        ),
    ] = 1 << 20
    prefix_caching: Annotated[bool, Meta(description="reuse KV of equal prefixes")] = True
    speculation: Annotated[Literal["auto", "off"], Meta(description="draft and verify several tokens a step")] = "auto"
    max_draft_tokens: Annotated[int, Meta(ge=1, le=64, description="longest draft a request may ask for")] = 16
    learn_history: Annotated[
        bool, Meta(description="draft from what an adapter served before, per adapter and cache_salt")
    ] = False
    history_dir: Annotated[Text | None, Meta(description="where that is kept over restarts; default: nowhere")] = None
    serving_log: Annotated[
        Text | None,
        Meta(description="folder that keeps served prompts and outputs, for specserve refit; default: nowhere"),
    ] = None
    serving_log_mib: Annotated[float, Meta(gt=0, description="disk for them, MiB; the oldest go")] = 256.0
    base_head: Annotated[
        Text | None,
        Meta(description="lookahead head of the bare base, for requests without adapter and for adapters without head"),
    ] = None
    max_lora_rank: Annotated[int, Meta(ge=1, le=1024, description="largest LoRA rank that is loaded")] = 256
    adapter_roots: Annotated[
        tuple[str, ...],
        Meta(description="folders that adapters loaded by path must lie in; default: --adapters-dir, else anywhere"),
    ] = ()
    max_adapters: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="adapters that steps can use without a load; default: 4096, on CUDA 256"),
    ] = None
    adapter_memory_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="main memory for adapters, GiB; default: half of what is free beside the KV cache"),
    ] = None
    adapter_device_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="memory for adapters on CUDA, GiB; default: half of what the KV cache leaves free"),
    ] = None
    num_threads: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="CPU threads of the model; default: all cores")
    ] = None


class ServeConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`EngineConfig` and what the HTTP server needs."""

    host: Annotated[str, Meta(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 picks a free one")] = 8000
    tls_certfile: Annotated[
        Text | None, Meta(description="PEM certificate chain: serve HTTPS; read again on SIGHUP")
    ] = None
    tls_keyfile: Annotated[Text | None, Meta(description="its PEM key; default: in the same file")] = None
    adapters_dir: Annotated[Text | None, Meta(description="every folder in it is an adapter of that name")] = None
    allowed_adapter_urls: Annotated[
        tuple[str, ...], Meta(description="prefixes of addresses (https://, s3://, gs://) that adapters may come from")
    ] = ()
    allowed_hub_repos: Annotated[
        tuple[str, ...], Meta(description="repositories of the hub that adapters may come from; * and ? match")
    ] = ()
    allowed_adapter_networks: Annotated[
        tuple[str, ...], Meta(description="networks, such as 10.0.0.0/8, that their host names may lead to")
    ] = ()
    adapter_cache_dir: Annotated[
        Text | None, Meta(description="where fetched adapters are kept; default: the user's cache")
    ] = None
    adapter_cache_gib: Annotated[float, Meta(gt=0, description="disk for them, GiB; idle ones make room")] = 10.0
    adapter_fetch_timeout_s: Annotated[float, Meta(gt=0, description="seconds that fetching one may take")] = 600.0
    shared_store: Annotated[
        Text | None,
        Meta(description="folder, or address such as s3://bucket/loras, of adapters that several servers share"),
    ] = None
    shared_store_refresh_s: Annotated[
        float, Meta(gt=0, description="seconds after which a change of a name in it is seen")
    ] = 5.0
    served_model_name: Annotated[Text | None, Meta(description="the base model's name in the API")] = None
    api_key: Annotated[Text | None, Meta(description="key that clients must send as a bearer token")] = None
    admin_api_key: Annotated[
        Text | None, Meta(description="key for loading and unloading adapters; default: the API key")
    ] = None
    api_keys_file: Annotated[
        Text | None, Meta(description="YAML file of key names, hashes, scopes and limits; read again on SIGHUP")
    ] = None
    isolate_keys: Annotated[
        bool | None,
        Meta(description="keys share no prefix cache and no learned drafts; default: while there is a file of keys"),
    ] = None
    open_info: Annotated[
        bool | None,
        Meta(description="metrics, version and OpenAPI document need no key; default: while there is no file of keys"),
    ] = None
    allowed_origins: Annotated[tuple[str, ...], Meta(description="browser origins that get a CORS grant")] = ()
    allowed_hosts: Annotated[tuple[str, ...], Meta(description="Host names to accept beside the listening one")] = ()
    max_body_mib: Annotated[float, Meta(gt=0, description="largest request body, MiB")] = 8.0
    read_timeout_s: Annotated[float, Meta(gt=0, description="seconds for a request's headers and body")] = 30.0
    write_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds that a client may take nothing of its answer before it is cut off")
    ] = 60.0
    request_timeout_s: Annotated[float, Meta(gt=0, description="longest time a request may take, seconds")] = 600.0
    highest_priority: Annotated[
        int,
        Meta(ge=-1000, le=0, description="the lowest number that requests may send as priority; lower is sooner"),
    ] = 0
    max_concurrent_requests: Annotated[int, Meta(ge=1, description="requests in the server; more get 429")] = 2048
    drain_timeout_s: Annotated[float, Meta(ge=0, description="seconds that running requests get at shutdown")] = 30.0
    engine_timeout_s: Annotated[
        float, Meta(ge=3, description="silence after which the engine process counts as hung and is restarted")
    ] = 20.0
    engine_step_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds after which a step counts as hung that should long be over; six times that on CUDA, "
            "where a step may compile, and 20 times what it should take where that is more",
        ),
    ] = 10.0
    tool_format: Annotated[
        Literal["auto", "hermes", "llama3", "mistral"],
        Meta(description="how the model writes tool calls; auto: as its chat template does"),
    ] = "auto"
    store_responses_mib: Annotated[
        float,
        Meta(ge=0, description="memory for responses of /v1/responses, to be read and continued, MiB; 0 keeps none"),
    ] = 0.0
    store_responses_s: Annotated[float, Meta(gt=0, description="seconds that they are kept")] = 3600.0
    batch_dir: Annotated[
        Text | None,
        Meta(description="folder for what /v1/files and /v1/batches keep; default: no batches"),
    ] = None
    batch_disk_gib: Annotated[float, Meta(gt=0, description="disk for them, answers included, GiB")] = 10.0
    batch_key_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="of it, what one key may take, GiB; default: half with --api-keys-file, else all"),
    ] = None
    batch_key_files: Annotated[int, Meta(ge=3, description="files of one key, and batches of it that ended")] = 10_000
    batch_keep_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="above so much, GiB, the batches that ended first go with their files, ten minutes after "
            "their end at the earliest; default: all stay for their time"
        ),
    ] = None
    batch_max_file_mib: Annotated[float, Meta(gt=0, description="largest file that may be uploaded, MiB")] = 200.0
    batch_max_rows: Annotated[int, Meta(ge=1, description="rows of one batch")] = 50_000
    metrics_prefix: Annotated[
        Literal["specserve", "vllm"],
        Meta(description="what names in /metrics begin with; vllm: as vLLM's own, for its dashboards and routers"),
    ] = "specserve"
    otlp_traces_endpoint: Annotated[
        Text | None, Meta(description="where OpenTelemetry spans go, such as http://localhost:4318/v1/traces")
    ] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="log verbosity")] = "info"

    @property
    def reads_again(self) -> bool:
        """Whether SIGHUP asks for something."""
        return self.api_keys_file is not None or self.tls_certfile is not None


class RayConfig(ServeConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`ServeConfig` and what several replicas on a Ray cluster need."""

    num_replicas: Annotated[int, Meta(ge=1, description="engines, each a replica; with max_replicas, at least")] = 1
    max_replicas: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="as many where the load asks for it; default: num_replicas")
    ] = None
    replica_waiting_tokens: Annotated[
        int, Meta(ge=1, description="tokens of waiting requests that ask for one more replica")
    ] = 4096
    scale_up_delay_s: Annotated[
        float, Meta(ge=0, description="seconds for which the load must ask for more replicas until there are more")
    ] = 30.0
    scale_down_delay_s: Annotated[
        float, Meta(ge=0, description="seconds for which it must ask for fewer until one leaves")
    ] = 600.0
    replica_cpus: Annotated[float, Meta(gt=0, description="CPU cores that Ray keeps for a replica")] = 1.0
    replica_gpus: Annotated[float, Meta(ge=0, description="GPUs that Ray keeps for a replica")] = 0.0
    ray_address: Annotated[
        Text | None, Meta(description="Ray cluster to run on; default: RAY_ADDRESS, else one of this machine alone")
    ] = None
    front_node: Annotated[
        Text | None, Meta(description="machine that listens, by its address in Ray; default: where the command runs")
    ] = None


def engine_part(config: ServeConfig) -> EngineConfig:
    """The engine's share of the settings."""
    return EngineConfig(**{name: getattr(config, name) for name in EngineConfig.__struct_fields__})
