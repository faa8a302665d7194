from typing import final

from kubeai.gateway.relay._head import Head

@final
class ResponseHead(Head): ...
