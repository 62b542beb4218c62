"""The browser page of an OUT: a server on the loopback, and what it serves.

server.py      HTTP: the token, hosts, ranges of files
catalogue.py   the images of an OUT, and what the page is told of each
page/          the page itself: plain modules as the browser reads them; main.js has the
               window, worker.js reads and paints tiles
page/vendor/   libraries, built by vendoring/ (see its README.md)
"""

from segpipe.viewer.server import Server, serve

__all__ = ["Server", "serve"]
