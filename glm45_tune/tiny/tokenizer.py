"""A small byte-level BPE tokenizer with GLM-4.5's special tokens, in GLM-4.5's order."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|begin_of_audio|> <|end_of_audio|> "
    "<|begin_of_transcription|> <|end_of_transcription|> <|code_prefix|> <|code_middle|> <|code_suffix|>"
).split()
# atomic, but part of what a model writes: kept when special tokens are skipped in decoding
MARKUP = (
    "/nothink <think> </think> <tool_call> </tool_call> <tool_response> </tool_response> "
    "<arg_key> </arg_key> <arg_value> </arg_value>"
).split()

# GLM-4.5 splits words, numbers of up to three digits, punctuation and white space before it merges bytes
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEXT = """\
北京市的政府驻地在哪里？上海市、天津市、重庆市是直辖市。省会，省份，自治区，特别行政区，中国有三十四个省级行政区。
浙江省的省会是杭州市。江苏省的省会是南京市。广东省的省会是广州市。四川省的省会是成都市。河北、河南、山东、山西。
湖北、湖南、江西、安徽、福建、海南、贵州、云南、陕西、甘肃、青海、辽宁、吉林、黑龙江、内蒙古、广西、西藏、宁夏、新疆。
你好！我是人工智能助手，请问有什么可以帮助你的吗？今天天气怎么样？我想一想这个问题，先思考，再回答。
The capital of a province is the seat of its government. What is the weather in Beijing today? Let me think about it.
You are a helpful assistant. The function returns a JSON object with the city and the temperature. Hello, how are you?
"""


def build(vocabulary: int = 640) -> Tokenizer:
    """A tokenizer of at most `vocabulary` byte-level words, the special tokens behind them."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, as a hub repository has them."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
        model_max_length=128000,
        padding_side="left",
    )
    fast.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    fast.save_pretrained(directory)
