from typing import final

@final
class Members: ...
