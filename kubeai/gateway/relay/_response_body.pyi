from typing import final

@final
class ResponseBody: ...
