"""A look inside: what the method sees in a user, an item or a semantic id, as data, as text and as a page."""

from gpl.inspect.page import html
from gpl.inspect.text import text
from gpl.inspect.views import AnchorView, ItemView, Neighbour, SidView, UserView
from gpl.inspect.world import Inspector

__all__ = ["AnchorView", "Inspector", "ItemView", "Neighbour", "SidView", "UserView", "html", "text"]
