"""Learning directions and routers: from transformers models, or from GGUF models without torch.

What needs torch is imported from its own module: `pysteer.extract.torch_capture.TorchCapture`,
`pysteer.extract.torch_model.TorchModel` and `pysteer.extract.learned`.
"""

from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.run import extract
from pysteer.extract.session import Data
from pysteer.extract.settings import ExtractSettings

__all__ = ["Data", "ExtractSettings", "LlamaCapture", "extract"]
