"""The only room that imports megatron."""

import logging
import warnings

# megatron recommends Transformer Engine and Apex at every import; torch looks for a CUDA compiler nobody asked for
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).* (is|are) not installed")
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=".*parse_schema.*", category=DeprecationWarning)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
logging.getLogger("megatron").setLevel(logging.ERROR)
