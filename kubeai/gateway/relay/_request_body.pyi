from typing import final

@final
class RequestBody: ...
