import sys, time, os
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:10")
from tests.fuzz.draw import draw
from tests.fuzz.checks import check
from tests.fuzz.learner_source import source
from tests.fuzz.isolate import isolated
import torch, torch._dynamo
torch.set_num_threads(1)
def go(c): return check(c)
a,b=map(int,sys.argv[1:3])
for k in range(a,b):
    c=draw(k); t=time.time()
    try: r=isolated(go,c,seconds=150)
    except Exception as e: r=("CRASH",[repr(e)[:3000]])
    print(k, r[0], f"{time.time()-t:.1f}s", c, flush=True)
    for l in r[1][:6]: print("    ", l[:2500] if len(sys.argv)>3 else l[:300])
