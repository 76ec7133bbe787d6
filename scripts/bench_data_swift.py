"""ms-swift's own preprocessing and packing of one file, for `bench_data.py --swift`, which runs this with ms-swift's Python.

python bench_data_swift.py MODEL FILE OUT SEQ_LENGTH: writes each row's token ids (null where it was lost) to OUT, prints one JSON object.
"""

import json
import os
import sys
import time

os.environ.setdefault("USE_HF", "1")


def main() -> None:
    model, file, out, seq_length = sys.argv[1:]
    from swift.dataset import AddLengthPreprocessor, load_dataset
    from swift.dataset.packing import PackingDataset
    from swift.model import get_processor
    from swift.template import get_template

    template = get_template(
        get_processor(model, model_type="glm4_moe"), max_length=int(seq_length), template_type="glm4_5"
    )
    template.set_mode("train")
    started = time.perf_counter()
    rows, _ = load_dataset([file], num_proc=1, load_from_cache_file=False, shuffle=False, remove_unused_columns=False)
    encoded = AddLengthPreprocessor(template=template)(rows, num_proc=1, load_from_cache_file=False)
    rendering = time.perf_counter() - started
    started = time.perf_counter()
    packed = PackingDataset(template, encoded, load_from_cache_file=False, packing_length=int(seq_length))
    packing = time.perf_counter() - started
    lengths = [length if isinstance(length, int) else sum(length) for length in encoded["lengths"]]
    kept = {}
    for row in encoded:
        try:
            kept[row["number"]] = template.encode(row)["input_ids"]
        except Exception as error:  # a row that ms-swift cannot take is a result: lost
            print(f"row {row['number']}: {error!r}", file=sys.stderr)
    with open(out, "w", encoding="utf-8") as handle:
        json.dump(kept, handle)
    fill = sum(lengths) / (len(packed) * int(seq_length))
    print(
        json.dumps(
            {"seconds": rendering, "packing": packing, "fill": fill, "kept": len(encoded), "tokens": sum(lengths)}
        )
    )


if __name__ == "__main__":
    main()
