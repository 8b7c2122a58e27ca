"""Every field of every body, declared once: what the routes read, and what the documents are made of.

A schema reads a field by its declaration here, so the name, the type, the range and the default that are documented
are the ones that are checked. A test compares what each route reads with what is declared for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from tokenspeed.entrypoints.body import (
    ARRAY,
    BIASES,
    BOOLEAN,
    INTEGER,
    INTEGERS,
    NUMBER,
    OBJECT,
    STRING,
    STRING_OR_STRINGS,
    STRINGS,
    Field,
    Kind,
)
from tokenspeed.entrypoints.limits import MAX_CACHE_KEY_CHARS, MAX_SALT_CHARS
from tokenspeed.request import MAX_LOGPROBS, MAX_N, MAX_SEED

MAX_INT = 2**31 - 1

PROMPTS = Kind[str | list[str | int | list[int]]](
    str | list[str | int | list[int]],
    "a string, an array of token ids, or an array of strings or of arrays of token ids",
    shows=False,
)
CHOICE = Kind[str | dict[str, msgspec.Raw]](str | dict[str, msgspec.Raw], "a string or an object", shows=False)
SCHEMA = Kind[str | bool | dict[str, msgspec.Raw]](
    str | bool | dict[str, msgspec.Raw], "an object (a JSON schema)", shows=False
)
TEXT_OR_ARRAY = Kind[str | list[msgspec.Raw]](str | list[msgspec.Raw], "a string or an array", shows=False)
KWARGS = Kind[dict[str, Any]](dict[str, Any], "an object", shows=False)
METADATA_TEXTS = Kind[dict[str, str]](dict[str, str], "an object of strings", shows=False)

# How tokens are chosen ---------------------------------------------------------------------------------

TEMPERATURE = Field("temperature", NUMBER, "0 is greedy", 1.0, least=0, most=100)
TOP_P = Field("top_p", NUMBER, "the most likely tokens that have this probability together", 1.0, above=0, most=1)
TOP_K = Field("top_k", INTEGER, "so many of the most likely tokens; 0 or −1: all", 0, least=-1, most=MAX_INT)
MIN_P = Field("min_p", NUMBER, "tokens with this share of the best one's probability", 0.0, least=0, most=1)
REPETITION_PENALTY = Field(
    "repetition_penalty", NUMBER, "divides the logits of tokens that were there", 1.0, least=0.01, most=100
)
PRESENCE_PENALTY = Field("presence_penalty", NUMBER, "taken off tokens that were generated", 0.0, least=-2, most=2)
FREQUENCY_PENALTY = Field("frequency_penalty", NUMBER, "the same, each time they were", 0.0, least=-2, most=2)
LOGIT_BIAS = Field("logit_bias", BIASES, "token id → what is added to its logit, −100 to 100")
BAD_WORDS = Field("bad_words", STRINGS, "texts that are never generated")
ALLOWED_TOKEN_IDS = Field("allowed_token_ids", INTEGERS, "the only tokens that may come")
MIN_TOKENS = Field("min_tokens", INTEGER, "nothing ends the answer before so many", 0, least=0, most=MAX_INT)
STOP = Field("stop", STRING_OR_STRINGS, "texts that end the answer and are left out of it; at most 16")
STOP_TOKEN_IDS = Field("stop_token_ids", INTEGERS, "tokens that end it")
IGNORE_EOS = Field("ignore_eos", BOOLEAN, "go on after the model's own end", False)
SEED = Field("seed", INTEGER, "the same seed gives the same text", least=-MAX_SEED, most=MAX_SEED - 1)
N = Field("n", INTEGER, "choices", 1, least=1, most=MAX_N)
PROMPT_LOGPROBS = Field(
    "prompt_logprobs", INTEGER, "the prompt's log-probabilities, with so many alternatives", least=0, most=MAX_LOGPROBS
)
SKIP_SPECIAL_TOKENS = Field("skip_special_tokens", BOOLEAN, "leave special tokens out of the text", True)
INCLUDE_STOP = Field("include_stop_str_in_output", BOOLEAN, "leave what ended the answer in it", False)
RESPONSE_FORMAT = Field("response_format", OBJECT, "type `text`, `json_object` or `json_schema`")
STRUCTURED_OUTPUTS = Field(
    "structured_outputs",
    OBJECT,
    "what the text must match",
    inner=(
        Field("json", SCHEMA, "a JSON schema"),
        Field("regex", STRING, "a regular expression"),
        Field("grammar", STRING, "a grammar in EBNF"),
        Field("choice", STRINGS, "one of these texts"),
        Field("json_object", BOOLEAN, "any JSON object", False),
    ),
)
GRAMMARS = (
    RESPONSE_FORMAT,
    STRUCTURED_OUTPUTS,
    Field("guided_json", SCHEMA, "`structured_outputs.json`, as vLLM had it"),
    Field("guided_regex", STRING, "`structured_outputs.regex`, likewise"),
    Field("guided_grammar", STRING, "`structured_outputs.grammar`, likewise"),
    Field("guided_choice", STRINGS, "`structured_outputs.choice`, likewise"),
    Field("json_schema", SCHEMA, "`structured_outputs.json`, as SGLang has it"),
    Field("regex", STRING, "`structured_outputs.regex`, likewise"),
    Field("ebnf", STRING, "`structured_outputs.grammar`, likewise"),
)
SAMPLING = (
    TEMPERATURE,
    TOP_P,
    TOP_K,
    MIN_P,
    REPETITION_PENALTY,
    PRESENCE_PENALTY,
    FREQUENCY_PENALTY,
    LOGIT_BIAS,
    BAD_WORDS,
    ALLOWED_TOKEN_IDS,
    MIN_TOKENS,
    STOP,
    STOP_TOKEN_IDS,
    IGNORE_EOS,
    SEED,
    N,
    PROMPT_LOGPROBS,
    SKIP_SPECIAL_TOKENS,
    INCLUDE_STOP,
    *GRAMMARS,
)

# How the answer goes out -------------------------------------------------------------------------------

MODEL = Field("model", STRING, "a served name", required=True)
ANY_MODEL = replace(MODEL, required=False)
STREAM = Field("stream", BOOLEAN, "send events as tokens come", False)
INCLUDE_USAGE = Field("include_usage", BOOLEAN, "end with an event that has the usage", False)
STREAM_OPTIONS = Field("stream_options", OBJECT, "only with `stream`", inner=(INCLUDE_USAGE,))
REQUEST_ID = Field("request_id", STRING, "a label, given back as `X-Request-Id`; wins over that header")
CACHE_SALT = Field(
    "cache_salt", STRING, f"cached prompts are found only with the same one; at most {MAX_SALT_CHARS} characters", ""
)
PRIORITY = Field("priority", INTEGER, "lower goes first", 0, least=-(2**31), most=MAX_INT)
PROMPT_CACHE_KEY = Field(
    "prompt_cache_key", STRING, f"names the session; at most {MAX_CACHE_KEY_CHARS} characters", ""
)
TPS_FLOOR = Field("tps_floor", NUMBER, "tokens a second that this stream is promised; 0: none", least=0)
RETURN_TOKEN_IDS = Field("return_token_ids", BOOLEAN, "give the ids beside the text", False)
DELIVERY = (
    MODEL,
    STREAM,
    STREAM_OPTIONS,
    REQUEST_ID,
    CACHE_SALT,
    PRIORITY,
    PROMPT_CACHE_KEY,
    TPS_FLOOR,
    RETURN_TOKEN_IDS,
)

# Conversations -----------------------------------------------------------------------------------------

MESSAGES = Field("messages", ARRAY, "the conversation", required=True)
OPTIONAL_MESSAGES = replace(MESSAGES, required=False)
TOOLS = Field("tools", ARRAY, "functions that the model may call")
TOOL_CHOICE = Field(
    "tool_choice", CHOICE, "`auto`, `none`, `required`, or an object: a function's name, or `allowed_tools`"
)
PARALLEL_TOOL_CALLS = Field("parallel_tool_calls", BOOLEAN, "false: the answer ends with its first call", True)
CHAT_TEMPLATE_KWARGS = Field("chat_template_kwargs", KWARGS, "variables for the chat template")
ADD_GENERATION_PROMPT = Field("add_generation_prompt", BOOLEAN, "begin the assistant's turn; true unless continuing")
CONTINUE_FINAL_MESSAGE = Field("continue_final_message", BOOLEAN, "go on with the assistant's last message", False)
INCLUDE_REASONING = Field("include_reasoning", BOOLEAN, "false leaves thinking out of the answer", True)
CONVERSATION = (
    MESSAGES,
    TOOLS,
    TOOL_CHOICE,
    PARALLEL_TOOL_CALLS,
    CHAT_TEMPLATE_KWARGS,
    ADD_GENERATION_PROMPT,
    CONTINUE_FINAL_MESSAGE,
)

MAX_TOKENS = Field("max_tokens", INTEGER, "at most so many; the rest of the context unless given", most=MAX_INT)
MAX_COMPLETION_TOKENS = Field("max_completion_tokens", INTEGER, "the same by its new name", least=1, most=MAX_INT)
LOGPROBS = Field("logprobs", BOOLEAN, "give log-probabilities", False)
TOP_LOGPROBS = Field("top_logprobs", INTEGER, "with so many alternatives", least=0, most=MAX_LOGPROBS)
CHAT_ECHO = Field("echo", BOOLEAN, "only false", False)

# Texts -------------------------------------------------------------------------------------------------

PROMPT = Field("prompt", PROMPTS, "a text, token ids, or an array of either", required=True)
ECHO = Field("echo", BOOLEAN, "put the prompt before the text; `max_tokens` may then be 0", False)
COMPLETION_LOGPROBS = Field(
    "logprobs", INTEGER, "log-probabilities with so many alternatives", least=0, most=MAX_LOGPROBS
)
COMPLETION_MAX_TOKENS = Field("max_tokens", INTEGER, "at most so many", 16, most=MAX_INT)

TEXT = Field("prompt", STRING, "a text, if there are no `messages`")
ADD_SPECIAL_TOKENS = Field("add_special_tokens", BOOLEAN, "as before a prompt; without effect on `messages`", True)
RETURN_TOKEN_STRS = Field("return_token_strs", BOOLEAN, "give the tokens' texts as well", False)
TOKENS = Field("tokens", INTEGERS, "token ids", required=True)
ABORTED = Field("request_id", STRING, "an answer's id, or the label of one or more", required=True)

# SGLang's /generate ------------------------------------------------------------------------------------

GENERATE_TEXT = Field("text", STRING_OR_STRINGS, "a prompt, or several")
INPUT_IDS = Field("input_ids", ARRAY, "token ids instead, of one prompt or of several")
MAX_NEW_TOKENS = Field("max_new_tokens", INTEGER, "at most so many", 128, least=1, most=MAX_INT)
RENAMED: dict[str, Field[Any]] = {"min_new_tokens": MIN_TOKENS, "no_stop_trim": INCLUDE_STOP, "sampling_seed": SEED}
"""SGLang's names of sampling parameters that are spelled otherwise here."""
SAMPLING_PARAMS = Field(
    "sampling_params",
    OBJECT,
    "how tokens are chosen",
    inner=(
        MAX_NEW_TOKENS,
        *(replace(field, name=name) for name, field in RENAMED.items()),
        *(field for field in SAMPLING if field not in (MIN_TOKENS, INCLUDE_STOP, SEED, PROMPT_LOGPROBS)),
    ),
)
RID = Field("rid", STRING, "a label, given back as the id and as `X-Request-Id`")
RETURN_LOGPROB = Field("return_logprob", BOOLEAN, "give log-probabilities of what was generated", False)
TOP_LOGPROBS_NUM = Field("top_logprobs_num", INTEGER, "with so many alternatives", 0, least=0, most=MAX_LOGPROBS)

# Responses ---------------------------------------------------------------------------------------------

INPUT = Field("input", TEXT_OR_ARRAY, "a text or items", required=True)
INSTRUCTIONS = Field("instructions", STRING, "a system message before all others")
MAX_OUTPUT_TOKENS = Field("max_output_tokens", INTEGER, "at most so many", least=1, most=MAX_INT)
PREVIOUS_RESPONSE_ID = Field("previous_response_id", STRING, "a stored response, which `input` continues")
STORE = Field("store", BOOLEAN, "keep the response for later requests", False)
TEXT_FORMAT = Field("text", OBJECT, "`format`: what the text must match")
TRUNCATION = Field("truncation", STRING, "only `disabled`")
INCLUDE = Field("include", STRINGS, "`message.output_text.logprobs` gives log-probabilities")
RESPONSES_METADATA = Field("metadata", METADATA_TEXTS, "given back")
MAX_TOOL_CALLS = Field("max_tool_calls", INTEGER, "given back, without effect")
REASONING = Field("reasoning", OBJECT, "given back, without effect")
SAFETY_IDENTIFIER = Field("safety_identifier", STRING, "given back, without effect")
USER = Field("user", STRING, "given back, without effect")

# Anthropic's messages ----------------------------------------------------------------------------------

SYSTEM = Field("system", TEXT_OR_ARRAY, "a text or blocks")
MESSAGES_MAX_TOKENS = Field(
    "max_tokens", INTEGER, "at most so many; 0 only fills the cache", most=MAX_INT, required=True
)
STOP_SEQUENCES = Field("stop_sequences", STRINGS, "texts that end the answer")
MESSAGES_TOOL_CHOICE = Field("tool_choice", OBJECT, "type `auto`, `any`, `none`, or `tool` with a name")
THINKING = Field("thinking", OBJECT, "type `enabled`, `adaptive` or `disabled`, for templates that know a switch")
MESSAGES_METADATA = Field("metadata", OBJECT, "`user_id` names the session, as Claude Code writes it")
OUTPUT_CONFIG = Field("output_config", OBJECT, "`format`: what the text must match")
OUTPUT_FORMAT = Field("output_format", OBJECT, "the same by its old name")
MCP_SERVERS = Field("mcp_servers", ARRAY, "must be empty")
