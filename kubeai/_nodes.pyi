from typing import final

@final
class VirtualNodes: ...
