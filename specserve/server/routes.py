"""Every HTTP route, once: what the server registers, what access rules are read from, and what /openapi.json says.

`add_routes` binds the names of handlers to methods, and refuses a table and handlers that do not match. Tests hold
every response to what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from .batches.types import (
    Batch,
    BatchList,
    BatchQuery,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
    FileQuery,
    FileUpload,
)
from .lorax.types import (
    LoraxInfo,
    LoraxRequest,
    LoraxResponse,
    LoraxStreamResponse,
    LoraxTokenizeRequest,
    SimpleToken,
)
from .openai.request_types import (
    AdapterNameRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from .openai.response_types import (
    AdapterExamples,
    AdapterList,
    AdapterLoadedResponse,
    ChatChunk,
    ChatResponse,
    CompletionResponse,
    DetokenizeResponse,
    MessageResponse,
    Model,
    ModelList,
    OpenApiDocument,
    StateResponse,
    TokenizeResponse,
    VersionResponse,
)
from .pooling.request_types import (
    ClassifyRequest,
    EmbeddingRequest,
    ModelQuery,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from .pooling.response_types import (
    ClassifyResponse,
    EmbeddingResponse,
    PoolingResponse,
    RerankResponse,
    ScoreResponse,
)
from .pooling.tei_types import (
    LoraxBatchRequest,
    LoraxEmbedding,
    LoraxEntity,
    LoraxTextRequest,
    SimilarityRequest,
    TeiEmbedRequest,
    TeiPrediction,
    TeiPredictRequest,
    TeiRank,
    TeiRerankRequest,
)
from .responses.request_types import ResponsesRequest
from .responses.response_types import DeletedResponse, Response, StreamEvent
from .route import Access, Handler, Route
from .stats.types import StatsQuery, StatsResponse

GET = (401, 403, 500)
POST = (400, *GET, 408, 413, 415, 429, 503)
GENERATE = (*POST, 404, 504)
LORAX = (*(status for status in GENERATE if status != 400), 422, 424)
POOL = (*GENERATE, 409)
SHARED = (*POOL, 422, 424)
STATE = (403, 500, 503)

ROUTES = (
    Route(
        "POST", "/v1/completions", "completions", "Text or token ids, continued", GENERATE,
        CompletionRequest, CompletionResponse, CompletionResponse,
    ),
    Route(
        "POST", "/v1/chat/completions", "chat_completions", "The next message of a conversation", GENERATE,
        ChatRequest, ChatResponse, ChatChunk,
    ),
    Route(
        "POST", "/v1/responses", "responses", "The next items of a conversation", GENERATE,
        ResponsesRequest, Response, StreamEvent, has_done=False,
    ),
    Route(
        "GET", "/v1/responses/{response_id:[^/]+}", "response", "A response that was kept", (400, *GET, 404),
        answer=Response,
    ),
    Route(
        "DELETE", "/v1/responses/{response_id:[^/]+}", "delete_response", "Forget it", (*GET, 404),
        answer=DeletedResponse,
    ),
    Route(
        "POST", "/v1/files", "upload_file", "Keep a file of rows for a batch", (*POST, 404, 507),
        FileUpload, FileObject, body_media="multipart/form-data",
    ),
    Route(
        "GET", "/v1/files", "files", "The files of the key", (400, *GET, 404, 503), answer=FileList, query=FileQuery
    ),
    Route("GET", "/v1/files/{file_id:[^/]+}", "file", "One of them", (*GET, 404, 503), answer=FileObject),
    Route(
        "GET", "/v1/files/{file_id:[^/]+}/content", "file_content", "What is in it", (*GET, 404, 503),
        media=("application/jsonl",),
    ),
    Route(
        "DELETE", "/v1/files/{file_id:[^/]+}", "delete_file", "Delete it", (*GET, 404, 409, 503, 507),
        answer=FileDeleted,
    ),
    Route(
        "POST", "/v1/batches", "create_batch", "Answer the rows of a file, behind all other requests",
        (*POST, 404, 507), BatchRequest, Batch,
    ),
    Route(
        "GET", "/v1/batches", "batches", "The batches of the key", (400, *GET, 404, 503),
        answer=BatchList, query=BatchQuery,
    ),
    Route("GET", "/v1/batches/{batch_id:[^/]+}", "batch", "One of them", (*GET, 404, 503), answer=Batch),
    Route(
        "POST", "/v1/batches/{batch_id:[^/]+}/cancel", "cancel_batch", "End it before all rows are answered",
        (*POST, 404, 409, 507), answer=Batch,
    ),
    Route("GET", "/v1/models", "models", "The base model and its adapters", (*GET, 503), answer=ModelList),
    Route("GET", "/v1/models/{model:.+}", "model", "One of them", (400, *GET, 404, 503), answer=Model),
    Route(
        "POST", "/tokenize", "tokenize", "Text or messages as token ids; with inputs in LoRAX's shape",
        (*POST, 404, 422), (TokenizeRequest, LoraxTokenizeRequest), (TokenizeResponse, list[SimpleToken]),
    ),
    Route(
        "POST", "/detokenize", "detokenize", "Token ids as text", (*POST, 404), DetokenizeRequest, DetokenizeResponse
    ),
    Route(
        "POST", "/generate", "lorax_generate", "LoRAX: text continued", LORAX, LoraxRequest, LoraxResponse,
        errors="lorax",
    ),
    Route(
        "POST", "/generate_stream", "lorax_generate_stream", "LoRAX: text continued, a token an event", LORAX,
        LoraxRequest, events=LoraxStreamResponse, errors="lorax",
    ),
    Route(
        "POST", "/v1/embeddings", "embeddings", "Embeddings of texts or token ids", POOL,
        EmbeddingRequest, EmbeddingResponse, query=ModelQuery,
    ),
    Route(
        "POST", "/v1/rerank", "rerank_v1", "Documents by their relevance to a query", POOL,
        RerankRequest, RerankResponse, query=ModelQuery,
    ),
    Route(
        "POST", "/v2/rerank", "rerank_v2", "The same as Cohere's second version has it", POOL,
        RerankRequest, RerankResponse, query=ModelQuery,
    ),
    Route(
        "POST", "/rerank", "rerank", "The same as Jina has it; with texts as text-embeddings-inference has it",
        SHARED, (RerankRequest, TeiRerankRequest), (RerankResponse, list[TeiRank]), query=ModelQuery,
    ),
    Route(
        "POST", "/score", "score", "Pairs of texts: relevance, or the cosine of their embeddings", POOL,
        ScoreRequest, ScoreResponse, query=ModelQuery,
    ),
    Route(
        "POST", "/classify", "classify", "All questions of an adapter, answered; with inputs as LoRAX has it", SHARED,
        (ClassifyRequest, LoraxTextRequest), (ClassifyResponse, list[LoraxEntity]), query=ModelQuery,
    ),
    Route(
        "POST", "/classify_batch", "classify_batch", "LoRAX: labels that hold, of several texts", LORAX,
        LoraxBatchRequest, list[list[LoraxEntity]], query=ModelQuery, errors="lorax",
    ),
    Route(
        "POST", "/pooling", "pooling", "Whatever the adapter makes of a text", POOL, PoolingRequest, PoolingResponse,
        query=ModelQuery,
    ),
    Route(
        "POST", "/embed", "embed", "Embeddings, as text-embeddings-inference or LoRAX has them", LORAX,
        (TeiEmbedRequest, LoraxTextRequest), (list[list[float]], LoraxEmbedding), query=ModelQuery, errors="lorax",
    ),
    Route(
        "POST", "/predict", "predict", "text-embeddings-inference: labels with their scores", LORAX,
        TeiPredictRequest, (list[TeiPrediction], list[list[TeiPrediction]]), query=ModelQuery, errors="lorax",
    ),
    Route(
        "POST", "/similarity", "similarity", "text-embeddings-inference: how alike a sentence and others are", LORAX,
        SimilarityRequest, list[float], query=ModelQuery, errors="lorax",
    ),
    Route(
        "GET", "/", "root", "The page for those who accept text/html; else as /health", (304, *STATE),
        answer=StateResponse, media=("text/html",), access="open", errors="lorax",
    ),
    Route(
        "GET", "/ui/{path:.+}", "page_file", "A file of the page", (304, 403, 404, 500),
        media=("text/css", "text/javascript", "image/svg+xml", "text/html", "text/plain"), access="open",
    ),
    Route("GET", "/leaderboard", "leaderboard_root", "Leads to /leaderboard/", (301, *GET), media=("text/html",)),
    Route(
        "GET", "/leaderboard/", "leaderboard", "The leaderboard of --leaderboard", (304, *GET, 404, 503),
        media=("text/html",),
    ),
    Route(
        "GET", "/leaderboard/{name:.+}", "leaderboard_page", "One of its pages, or board.json",
        (304, *GET, 404, 503), media=("text/html", "application/json"),
    ),
    Route(
        "POST", "/", "lorax_compat", "LoRAX: one of both, by `stream`", LORAX, LoraxRequest, list[LoraxResponse],
        LoraxStreamResponse, errors="lorax",
    ),
    Route("GET", "/info", "lorax_info", "LoRAX: model and limits", GET, answer=LoraxInfo, errors="lorax"),
    Route(
        "POST", "/v1/load_lora_adapter", "load_adapter", "Load an adapter directory under a name",
        (*POST, 404, 409, 502, 504),
        LoadAdapterRequest, AdapterLoadedResponse, access="admin",
    ),
    Route(
        "POST", "/v1/unload_lora_adapter", "unload_adapter", "Take a name away", (*POST, 404),
        UnloadAdapterRequest, MessageResponse, access="admin",
    ),
    Route("GET", "/v1/adapters", "adapters", "Adapters, where they lie and their use", GET, answer=AdapterList),
    Route(
        "GET", "/v1/adapters/{name:[^/]+}/examples", "adapter_examples", "Prompts that come with it",
        (400, *GET, 404, 503), answer=AdapterExamples,
    ),
    Route(
        "GET", "/v1/adapters/{name:[^/]+}/report", "adapter_report", "The report of its training",
        (400, *GET, 404, 503), media=("text/html",),
    ),
    Route(
        "POST", "/v1/pin_lora_adapter", "pin_adapter", "Load an adapter and keep it loaded", (*POST, 404, 409),
        AdapterNameRequest, AdapterLoadedResponse, access="admin",
    ),
    Route(
        "POST", "/v1/unpin_lora_adapter", "unpin_adapter", "Let it make room again", (*POST, 404),
        AdapterNameRequest, MessageResponse, access="admin",
    ),
    Route(
        "POST", "/v1/prefetch_lora_adapter", "prefetch_adapter", "Begin to load an adapter if idle ones make room",
        (*POST, 404), AdapterNameRequest, MessageResponse, access="admin",
    ),
    Route("GET", "/health", "health", "200 while the engine serves", STATE, answer=StateResponse, access="open"),
    Route("GET", "/ready", "ready", "503 during shutdown too", STATE, answer=StateResponse, access="open"),
    Route("GET", "/version", "version", "The server's version", GET, answer=VersionResponse, access="info"),
    Route("GET", "/metrics", "metrics", "Prometheus text", GET, access="metrics"),
    Route(
        "GET", "/v1/stats", "stats", "State and counters of the engine, once or every second", (400, *GET, 429, 503),
        answer=StatsResponse, events=StatsResponse, query=StatsQuery, access="metrics",
    ),
    Route("GET", "/openapi.json", "openapi", "This document", GET, answer=OpenApiDocument, access="info"),
)  # fmt: skip

ACCESS: dict[tuple[str, str], Access] = {(route.method, route.path): route.access for route in ROUTES}
OPEN_FOLDERS = tuple(
    route.path.partition("{")[0] for route in ROUTES if route.access == "open" and route.path.endswith("/{path:.+}")
)
ERRORS: dict[str, str] = {route.path: route.errors for route in ROUTES}


def access_of(method: str, path: str) -> Access:
    """Who may ask; what is no route, and a method that a path has not, is for those with the key."""
    if method in ("GET", "HEAD") and path.startswith(OPEN_FOLDERS):
        return "open"
    methods = ("GET", "POST", "DELETE") if method == "OPTIONS" else ("GET" if method == "HEAD" else method,)
    found = {ACCESS[name, path] for name in methods if (name, path) in ACCESS}
    return found.pop() if len(found) == 1 else "key"


def meant_path(method: str, path: str) -> str | None:
    """The route that an address without one may mean: /v1 is forgotten or said twice, a slash is one too many."""
    bare = "/" + "/".join(part for part in path.split("/") if part)
    while bare.startswith("/v1/v1/"):
        bare = bare.removeprefix("/v1")
    return next((each for each in (bare, f"/v1{bare}", bare.removeprefix("/v1")) if (method, each) in ACCESS), None)


def add_routes(app: web.Application, handlers: Mapping[str, Handler]) -> None:
    """Register the whole table; `handlers` must hold exactly its handler names."""
    assert set(handlers) == {route.handler for route in ROUTES}, set(handlers) ^ {route.handler for route in ROUTES}
    for route in ROUTES:
        add = {"GET": app.router.add_get, "POST": app.router.add_post, "DELETE": app.router.add_delete}[route.method]
        add(route.path, handlers[route.handler])  # add_get serves HEAD too
