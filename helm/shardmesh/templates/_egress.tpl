{{/*
Egress rules that more than one policy has. DNS servers live in pods, on the node or behind a link-local address: the port says it.
*/}}
{{- define "shardmesh.egress.dns" -}}
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end -}}

{{/* The hub redirects to other hosts for large files: no address can be named. */}}
{{- define "shardmesh.egress.hub" -}}
- ports:
    - port: 443
      protocol: TCP
{{- end -}}
