"""Order pictures from the web service: `python order.py http://127.0.0.1:8080 lion tiger`."""

import json
import sys
from urllib.request import Request, urlopen

url, *names = sys.argv[1:]
for name in names:
    body = json.dumps({"name": name}).encode()
    with urlopen(Request(f"{url}/pictures", body, {"Content-Type": "application/json"})) as answer:
        print(name, json.load(answer)["painting"])
