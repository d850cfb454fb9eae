#!/usr/bin/env bash
# Everything docs/devices.md promises, typed out on one machine: export, verify without PyTorch, verify through a
# real sshd on 127.0.0.1, gate green, red and undecided, hostile bundles refused.
#
#   bash examples/on_device.sh [WORKING FOLDER]
#
# Needs: vit-export with its export, onnxruntime and openvino extras on PATH, pip with a package index, and Debian's
# openssh-server, openssh-client and rsync. Takes some minutes, nearly all of them measuring.
set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(realpath -m "${1:-on-device}"); mkdir -p "$work"; cd "$work"

run() { # run EXPECTED_EXIT COMMAND...: show the command and its output, and stop if the exit code is another
  printf '\n$ %s\n' "${*:2}"; "${@:2}"; local code=$?
  printf '[exit %s]\n' "$code"; [ "$code" = "$1" ] || { echo "expected $1" >&2; exit 1; }
}

export_to() { # export_to FOLDER OPTIONS...: unless an earlier run of this script did
  [ -f "$1/bundle/manifest.json" ] || run 0 vit-export --int8 "${@:2}" --quiet -o "$1"
}

# 1. Export, twice: the bundles are the same bytes. (The manifest names files that may differ in "varies".)
for folder in out again; do export_to $folder --target onnx --target openvino --eval-size 300 --zip; done
grep -A3 '"varies"' out/bundle/manifest.json
run 0 diff -rq out/bundle again/bundle
run 0 cmp out/bundle.zip again/bundle.zip

# 2. A device: the base wheel and one runtime in an empty environment.
[ -x device/bin/vit-export ] || {
  python3 -m venv device
  device/bin/pip install --quiet "vit-export[onnxruntime] @ file://$here"
}
run 1 device/bin/python -c 'import torch'
run 0 env -i PATH=/usr/bin:/bin device/bin/vit-export verify out/bundle.zip --target onnx --quiet -o verified

# 3. The same through a real sshd, as to a board.
mkdir -p ssh /run/sshd
[ -f ssh/host ] || for key in host user; do ssh-keygen -q -t ed25519 -N '' -f ssh/$key; done
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
printf '%s\n' "Port $port" "ListenAddress 127.0.0.1" "HostKey $work/ssh/host" "StrictModes no" "UsePAM no" \
  "AuthorizedKeysFile $work/ssh/user.pub" "PasswordAuthentication no" "PidFile none" \
  "Subsystem sftp internal-sftp" > ssh/sshd_config
printf '%s\n' "Host *" "  IdentityFile $work/ssh/user" "  IdentitiesOnly yes" \
  "  UserKnownHostsFile $work/ssh/known_hosts" > ssh/config
echo "* $(cut -d' ' -f1,2 ssh/host.pub)" > ssh/known_hosts
/usr/sbin/sshd -D -f ssh/sshd_config & server=$!
trap 'kill $server' EXIT
sleep 1
run 0 vit-export verify out --target onnx --host "ssh://127.0.0.1:$port" --ssh-config ssh/config \
  --python "$work/device/bin/python" --quiet -o over-ssh
run 3 vit-export verify out --host "ssh://127.0.0.1:$port" --ssh-config ssh/config --python /usr/bin/python3 -o none

# 4. The gate: green against itself, red for weights that lost two points, undecided with 30 images.
printf '[[rule]]\nmetric = "top1_regression"\nmax = 1.0\n' > gate.toml
run 0 vit-export gate out --baseline out --rules gate.toml
python3 "$here/examples/perturb_digits.py" worse.safetensors
export_to worse --eval-size 300 --checkpoint worse.safetensors
run 1 vit-export gate worse --baseline out --rules gate.toml --annotations
export_to thirty --eval-size 30
sed -i '1i inconclusive_exit = 7' gate.toml
run 7 vit-export gate thirty --baseline thirty --rules gate.toml

# 5. Bundles that were tampered with, cut, or would leave their folder: exit 2, and nothing is written.
mkdir -p hostile; cp -rL out/bundle hostile/tampered
printf x | dd of=hostile/tampered/onnx/int8/96x96/model.onnx bs=1 seek=100000 conv=notrunc status=none
head -c 1000000 out/bundle.zip > hostile/cut.zip
cp -rL out/bundle hostile/link; ln -sf /etc/passwd hostile/link/plan.json
python3 - <<'PY'
import shutil, zipfile
for name, member, content in (
    ("up", "../../escaped", b"x"), ("absolute", "/tmp/escaped", b"x"), ("bomb", "plan2.json", bytes(1 << 28)),
):
    shutil.copyfile("out/bundle.zip", f"hostile/{name}.zip")
    with zipfile.ZipFile(f"hostile/{name}.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
PY
before=$(find . /tmp/escaped 2>/dev/null | sort | sha256sum)
for bad in tampered cut.zip link up.zip absolute.zip bomb.zip; do
  run 2 device/bin/vit-export verify hostile/$bad -o refused
done
[ "$before" = "$(find . /tmp/escaped 2>/dev/null | sort | sha256sum)" ] && printf '\nnothing was written\n'
