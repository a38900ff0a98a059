"""Data: files to records, records to ids, ids to batches, in an order that is a function of (seed, epoch)."""

from alignax.data.chat import ChatTemplate, load_template, template_specials
from alignax.data.formats import FORMATS
from alignax.data.layouts import (
    LAYOUT_NAMES,
    Shape,
    bucket,
    bucket_shape,
    fill,
    mismatched,
    occupancy,
    padded,
    plan_shape,
    shared_prefix,
)
from alignax.data.ledger import Ledger
from alignax.data.messages import Frozen, Message
from alignax.data.mixture import Mixture, load_mixture, parse_mixture
from alignax.data.plan import Plan, epoch_order
from alignax.data.prefetch import batches
from alignax.data.records import Record, as_dialogue, from_json, read_jsonl, record_number, to_json, write_jsonl
from alignax.data.store import Prepared, Store, is_prepared, load_records, open_store, prepare
from alignax.data.stories import generate_corpus, split_prompts, stories_tokenizer
from alignax.data.streams import aux_prompts, degraded, reference_samples
from alignax.data.tasks import prompt_texts, story_records
from alignax.data.tokens import (
    TextPolicy,
    Tokenizer,
    check_vocab,
    load_policy,
    load_tokenizer,
    text_policy,
    train_tokenizer,
    word_tokenizer,
)
from alignax.data.truncate import TRUNCATION, TokenRecord, token_record, tokenize_records

__all__ = ["FORMATS", "LAYOUT_NAMES", "TRUNCATION", "ChatTemplate", "Frozen", "Ledger", "Message", "Mixture", "Plan",
           "Prepared", "Record", "Shape", "Store", "TextPolicy", "TokenRecord", "Tokenizer", "as_dialogue",
           "aux_prompts", "batches", "degraded", "reference_samples",
           "bucket", "bucket_shape", "check_vocab", "epoch_order", "fill", "from_json", "generate_corpus",
           "is_prepared", "load_mixture", "load_policy", "load_records", "load_template", "load_tokenizer",
           "mismatched", "occupancy", "open_store", "padded", "parse_mixture", "plan_shape", "prepare", "prompt_texts",
           "read_jsonl", "record_number", "shared_prefix", "split_prompts", "stories_tokenizer", "story_records",
           "template_specials", "text_policy", "to_json", "token_record", "tokenize_records", "train_tokenizer",
           "word_tokenizer", "write_jsonl"]
