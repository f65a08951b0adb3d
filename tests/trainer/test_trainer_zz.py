import gc, weakref, time
from trainer_helpers import stream_of
from growthring.trainer import steps, continual
def test_x(build, monkeypatch):
    refs=[]
    class Spy(steps.StreamTrainer):
        def run(self):
            n=super().run(); refs.append(weakref.ref(self)); refs.append(weakref.ref(self.optimizer)); return n
    monkeypatch.setattr(continual,"StreamTrainer",Spy)
    t=build(stream_of(1)); gc.disable(); t.fit()
    print([r() is not None for r in refs])
    for r in refs:
      if r() is not None: print([ (type(x), list(x)[:5] if isinstance(x,dict) else "") for x in gc.get_referrers(r())])
    gc.enable()
    print(vars(t.model).keys(), type(t.model.forward))
    gc.collect(); gc.freeze()
    for i in range(3):
        c=time.time(); gc.collect(); print(time.time()-c)
